"""A frozen reward model: its tokens of a conversation, and the embedding that its head scores.

An embedding [F] is the last hidden state, after the final norm, of the rendered conversation's last
token; the model's own reward is its score head times that.
"""

import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lore.common.devices import pick_device
from lore.common.files import InputError, file_sha256, first_line, require
from lore.embeddings.prefix_trees import Pass, Tokens, batches, tree_blocks, tree_mask, tree_passes

log = logging.getLogger(__name__)

PAPERS_MODEL = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
Conversation = list[dict[str, str]]
# How far embedding @ head may be from the model's own logit, as a share of |embedding| @ |head|.
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 3e-3}
# Where tests/embeddings/test_store.py shows that the tree mask gives the rows of one at a time.
TREE_MODELS = ("llama", "qwen2", "qwen3", "mistral", "gemma")
# Rotary embeddings that give a token the same angles whatever else is in its batch.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
ENCODERS = re.compile("albert|bert|electra|deberta|mpnet|xlnet")  # kinds whose tokens see the next
NOT_FINITE = "the model gives embeddings that are not finite: try another --dtype"
SMALL = "without a network, `python tools/smollm2.py` makes a small model"


class Source(NamedTuple):
    """Where a model and its tokenizer come from, names on the hub or local folders; its pooling."""

    model: str = PAPERS_MODEL
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    pool: str = "last"


@dataclass(frozen=True)
class ModelChoice:
    """The reward model that a basis is used with.

    Args:
        model: reward model, a hub name or a local folder; by default the one that the basis was
            learned with.
        tokenizer: hub name or folder of the tokenizer, if it is not the model's own.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run model code that comes with a hub model.
        any_model: take the model even if the basis was learned with another one.
    """

    model: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    any_model: bool = False

    def of_basis(self, settings: Mapping[str, Any], path: str | Path, width: int = 0) -> Source:
        """The model for a basis with these settings in this file, as ``check_model`` allows it;
        InputError if its embeddings are of another width than one given."""
        source = self.resolve(settings, path)
        config = load_config(source)  # a hub model's commit is known once something is loaded
        check_model(settings, model_facts(source, load_tokenizer(source)), self.any_model)
        size = config.get_text_config().hidden_size
        sizes = f"--model {source.model} has {size} features, the basis {width}"
        require(width in (0, size), sizes)
        return source

    def resolve(self, settings: Mapping[str, Any], path: str | Path) -> Source:
        """What is given, else what the basis was learned with; the pooling is always the basis'.
        Folders in its settings are relative to its file's; InputError if none is said or there."""
        model, tokenizer, revision = self.model, self.tokenizer, self.revision
        if not model:
            model = _find(settings.get("model"), path, "model")
            revision = revision or settings.get("revision")
            if not tokenizer and settings.get("tokenizer") not in (None, settings["model"]):
                tokenizer = _find(settings["tokenizer"], path, "tokenizer")
        pool = str(settings.get("pool") or "last")
        return Source(model, tokenizer, revision, self.trust_remote_code, pool)


OF_BASIS = ModelChoice()


def load_config(source: Source) -> Any:
    """The model's config; InputError if it has no such layer as is to be pooled."""
    from transformers import AutoConfig  # slow to import, and who reads a store does without

    config = pretrained(AutoConfig, source.model, source)
    if source.pool not in ("last", "mean"):
        kind, _, number = source.pool.partition(":")
        layers = config.get_text_config().num_hidden_layers
        there = kind == "layer" and number.isdigit() and 1 <= int(number) <= layers
        require(there, f"--pool {source.pool}: {source.model} has layers 1 to {layers}")
    return config


def load_tokenizer(source: Source) -> Any:
    """The tokenizer; InputError if it has no chat template."""
    from transformers import AutoTokenizer

    name = source.tokenizer or source.model
    tokenizer = pretrained(AutoTokenizer, name, source)
    has_one = bool(tokenizer.chat_template)
    require(has_one, f"the tokenizer {name} has no chat template: name one with --tokenizer")
    return tokenizer


def pretrained(loader: Any, name: str, source: Source, **options: Any) -> Any:
    """The source's model or tokenizer by an Auto class of transformers; else InputError."""
    from transformers.utils import logging as theirs

    gone = _is_path(name) and not Path(name).exists()
    require(not gone, f"{name} cannot be loaded: there is no such folder")
    if name == source.model:
        options["revision"] = source.revision
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_table)
    if not sys.stderr.isatty():
        theirs.disable_progress_bar()
    try:
        return loader.from_pretrained(name, trust_remote_code=source.trust_remote_code, **options)
    except Exception as error:  # what damaged files raise has no common class
        raise InputError(f"{name} cannot be loaded: {_why(error)}") from error


def _is_no_table(record: logging.LogRecord) -> bool:
    """Not transformers' table of tensors that lack or do not fit: ``_load_model`` says these."""
    said = record.getMessage()
    return "LOAD REPORT" not in said or "CONVERSION" in said


def _is_path(name: str) -> bool:
    """Whether a name is a local path, there or not, and no name on the hub."""
    above = Path(name).parent
    is_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    return is_path or (above != Path() and above.is_dir())


def _why(error: Exception) -> str:
    """What went wrong and, if it was on the hub's side, what to do, in one line."""
    cause = error.__cause__ or error.__context__
    if str(error).startswith("Can't load") and cause:  # says nothing of a failed download
        error = cause
    if isinstance(error, UnpicklingError):  # which advises to unpickle whatever it is
        return "its weights are damaged, or hold something else than tensors"
    why = " ".join(str(error).split())[:600]
    if not isinstance(error, OSError | ValueError | ImportError):  # such as a key, and no more
        why = f"{type(error).__name__}: {why}"
    if "gated" in why:
        return f"{why} Ask for access on its page, then log in with `hf auth login`"
    if "connection" in why:
        why += "; run it again, the download goes on where it was"
    offline = any(words in why for words in ("connection", "offline mode", "connect to"))
    return f"{why}; {SMALL}" if offline else why


def model_facts(source: Source, tokenizer: Any) -> dict[str, str | None]:
    """What tells a model from others of its name: a hub model's commit, or else a hash of the local
    files, and a hash of the chat template; local folders are absolute paths."""
    from huggingface_hub import try_to_load_from_cache

    revision = weights = None
    if Path(source.model).is_dir():
        kinds = ("*.safetensors", "*.bin", "config.json")
        files = sorted(file for kind in kinds for file in Path(source.model).glob(kind))
        weights = sha256(*(file_sha256(file).encode() for file in files))
    else:
        config = try_to_load_from_cache(source.model, "config.json", revision=source.revision)
        revision = Path(str(config)).parent.name
    names = (source.model, source.tokenizer or source.model)
    model, writer = (os.path.abspath(name) if Path(name).is_dir() else name for name in names)
    template = sha256(tokenizer.get_chat_template().encode())
    return {"model": model, "revision": revision, "weights_sha256": weights,
            "tokenizer": writer, "template_sha256": template}  # fmt: skip


def _find(name: str | None, path: str | Path, what: str) -> str:
    """A hub name as it is, a local folder as the path that it has from here."""
    require(bool(name), f"{path} does not say which model it was learned on: name it by --model")
    local = Path(path).parent / str(name)  # an absolute path stays what it is
    if local.is_dir():
        return str(local)
    moved = f"{path} was learned with the {what} in {name}, which is not there: name it by --{what}"
    require(not _is_path(name), moved)
    return name


def check_model(
    settings: Mapping[str, Any], facts: Mapping[str, Any], any_model: bool = False
) -> None:
    """InputError, or a warning with ``any_model``, for a model whose weights, commit or template
    (``model_facts``) are not those in a basis' settings; what either does not say may differ."""
    what = {"weights_sha256": "other weights", "revision": "another commit",
            "template_sha256": "another chat template"}  # fmt: skip
    both = [key for key in what if settings.get(key) and facts.get(key)]
    if others := " and ".join(what[key] for key in both if settings[key] != facts[key]):
        problem = f"{facts['model']} has {others} than the model the basis was learned with"
        remedy = "name that model by --model, or insist with --any-model true"
        require(any_model, f"{problem}: {remedy}")
        log.warning("WARNING: %s; the rewards may mean nothing", problem)


def device_and_dtype(device: str, dtype: str) -> tuple[str, str]:
    """What auto stands for: a GPU and bfloat16, else a CPU and float32. InputError for a device
    that is not here."""
    device = str(pick_device(device))
    if device == "cuda":  # each process of torchrun has a GPU of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device, ("float32" if device == "cpu" else "bfloat16") if dtype == "auto" else dtype


def sha256(*parts: bytes | memoryview) -> str:
    """SHA-256 of bytes, one part after the other."""
    return hashlib.sha256(b"".join(parts)).hexdigest()


def render_text(tokenizer: Any, conversation: Conversation, is_prompt: bool = False) -> str:
    """The conversation as the tokenizer's chat template writes it, with the generation prompt if it
    ``is_prompt``; InputError if the template refuses it."""
    whose, start = f"the chat template of {tokenizer.name_or_path}", f"{str(conversation)[:100]}..."
    try:
        written = {"tokenize": False, "add_generation_prompt": is_prompt}
        text = tokenizer.apply_chat_template(conversation, **written)
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise InputError(f"{whose} cannot write {start}: {first_line(error)}") from error
    require(bool(text.strip()), f"{whose} writes nothing for {start}")
    return text


def render(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Token ids of the chat-templated conversation, with one BOS in front if the model has one."""
    return next(tokenize(tokenizer, [render_text(tokenizer, conversation)])).tolist()


def tokenize(tokenizer: Any, texts: Iterable[str]) -> Iterator[Tokens]:
    """Token ids of rendered texts, with one BOS in front if the model has one: template and
    tokenizer may each write one or not."""
    bos, texts = tokenizer.bos_token_id, iter(texts)
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    while some := list(islice(texts, 1000)):  # lists of ints take much memory
        for ids in tokenizer(some, add_special_tokens=False)["input_ids"]:
            written = next((i for i, token in enumerate(ids) if token != bos), len(ids))
            first = [bos] if adds_bos or written else []
            yield np.array([*first, *ids[written:]], dtype=np.int64)


def cut_tokens(ids: Tokens, bos: int | None, max_length: int, truncation_side: str) -> Tokens:
    """At most max_length tokens, cut on the left or right; a BOS stays in front."""
    if len(ids) <= max_length or truncation_side == "right":
        return ids[:max_length]
    first = ids[: int(ids[0] == bos and max_length > 1)]
    return np.append(first, ids[len(ids) - max_length + len(first) :])


@dataclass
class Engine:
    """A loaded reward model, and how it is given its conversations (see ``store.embed``)."""

    model: Any  # for sequence classification, on its device
    has_head: bool  # its score head comes from the checkpoint; else it is a random one
    method: str
    batch_tokens: int
    flex: bool = False  # trees take FlexAttention, else the dense mask; turned off where it fails
    pool: str = "last"
    tokens_computed: int = 0
    checked: bool = False

    def reference(self) -> dict[str, Tensor]:
        """What the model scores the last token's state with: head [outputs, F] and bias, if it has
        them, and what the published code takes for the head, column 0 [F] of the last nn.Linear of
        the body, which is the model without its head, if that is F long."""
        if self.pool != "last":
            return {}
        score = self.model.score if self.has_head else None
        tensors = {"head": getattr(score, "weight", None), "bias": getattr(score, "bias", None)}
        linear = [m for m in self.model.base_model.modules() if isinstance(m, torch.nn.Linear)]
        if linear and len(linear[-1].weight) == self.model.config.get_text_config().hidden_size:
            tensors["last_linear"] = linear[-1].weight[:, 0]
        there = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
        return {name: tensor.float().cpu().contiguous() for name, tensor in there.items()}

    def embed(self, tokens: list[Tokens], bar: tqdm, starts: list[int] | None = None) -> Tensor:
        """Embeddings [n, F] of n distinct, sorted conversations, in the model's dtype: the mean of
        the states from token ``starts`` on, or the last one. Passes are halved when GPU memory runs
        out. InputError for a conversation too long for that, a token that the model lacks, numbers
        that are not finite, or a logit that is not the score head times the embedding."""
        known = self.model.base_model.get_input_embeddings().num_embeddings
        highest = max(int(ids.max()) for ids in tokens)
        knows = f"the tokenizer writes token {highest}, but the model knows {known} tokens only"
        require(highest < known, f"{knows}, from 0 on: name the model's own one with --tokenizer")
        before = bar.n, self.tokens_computed
        starts = [len(ids) - 1 for ids in tokens] if starts is None else starts
        while True:
            try:
                return self._embed(tokens, starts, bar)
            except torch.cuda.OutOfMemoryError:
                longest = max(map(len, tokens))
                small = f"{longest} tokens do not fit into the GPU's memory: lower --max-length"
                require(self.batch_tokens > longest, small)
            self.batch_tokens //= 2
            log.warning("GPU memory is full: continuing with --batch-tokens %d", self.batch_tokens)
            # The shard starts over, so that its bytes depend only on the budget that it ended with.
            bar.update(before[0] - bar.n)
            self.tokens_computed = before[1]
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _embed(self, tokens: list[Tokens], starts: list[int], bar: tqdm) -> Tensor:
        out, cut = None, tree_passes if self.method == "tree" else batches
        budget = self.batch_tokens if self.method != "single" else 0
        for step in cut(tokens, starts, budget):
            rows = self._forward(step)
            if not self.checked:
                self._check(tokens[step.rows[-1]], rows[-1])
            out = rows.new_empty(len(tokens), rows.shape[1]) if out is None else out
            out[step.rows] = rows
            bar.update(sum(len(tokens[row]) for row in step.rows))
            self.tokens_computed += step.num_tokens
        require(bool(out.isfinite().all()), NOT_FINITE)
        return out.cpu()

    def _forward(self, step: Pass) -> Tensor:
        """Embeddings [conversations of the pass, F]."""
        given = {name: tensor.to(self.model.device) for name, tensor in step.given.items()}
        hidden = self._hidden(given) if step.ends is None else self._tree_hidden(step.ends, given)
        states = hidden[step.pooled]
        if len(states) == len(step.rows):  # one each
            return states
        counts = step.counts.to(states.device)
        return torch.segment_reduce(states.float(), "mean", lengths=counts).to(states.dtype)

    def _hidden(self, given: dict[str, Any]) -> Tensor:
        """Hidden states [batch, length, F]."""
        layer = self.pool.partition(":")[2]
        found = self.model.base_model(use_cache=False, output_hidden_states=bool(layer), **given)
        return found.hidden_states[int(layer)] if layer else found.last_hidden_state

    def _tree_hidden(self, ends: Tensor, given: dict[str, Tensor]) -> Tensor:
        """Hidden states [1, T, F] of a tree, by FlexAttention or with the dense mask."""
        if self.flex:
            own = self.model.config._attn_implementation
            try:
                mask = tree_blocks(ends, self.model.device)
                self.model.set_attn_implementation("flex_attention")
                return self._hidden({"attention_mask": mask, **given})
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # compilers and kernels fail with classes of their own
                why = f"{type(error).__name__}: {first_line(error)}"[:300]
                log.warning("trees take the dense mask, without FlexAttention: %s", why)
                self.flex = False
            finally:
                self.model.set_attn_implementation(own)
        mask = tree_mask(ends.to(self.model.device), self.model.dtype)
        return self._hidden({"attention_mask": mask, **given})

    def _check(self, ids: Tokens, row: Tensor) -> None:
        """Stop unless the head times the row is the logit that the model itself gives."""
        self.checked = True
        require(bool(row.isfinite().all()), NOT_FINITE)
        if not self.has_head:
            return
        alone = {"input_ids": torch.from_numpy(ids)[None].to(self.model.device)}
        logit = self.model(**alone, use_cache=False).logits[0].float().cpu()
        states = self.model.base_model(**alone, use_cache=False).last_hidden_state[0]
        states, known = torch.vstack([row, states]).float().cpu(), self.reference()
        own = torch.nn.functional.linear(states, known["head"], known.get("bias"))
        scale = states.abs() @ known["head"].abs().T + 1e-6
        tolerance = LOGIT_TOLERANCE[str(self.model.dtype).removeprefix("torch.")]
        gives_it = ((own - logit).abs() <= tolerance * scale).all(1)  # [row, then each token]
        if gives_it[0]:
            return
        places = gives_it.nonzero()[:, 0].tolist()  # numbered from 1
        other = "this model's logit is not its score head times the last hidden state"
        require(bool(places), other)
        is_last = places[-1] == len(ids)
        require(is_last, f"this model pools token {places[-1]} of {len(ids)}, not the last")
        wrong = f"the {self.method} method does not give what a conversation alone gives"
        raise InputError(f"{wrong}: use --method single")


def load_engine(
    source: Source, dtype: str, device: str, attention: str, method: str, batch_tokens: int
) -> Engine:
    """A reward model by arguments of ``store.embed``, none auto but the method; InputError if it
    cannot be loaded, is no decoder, or the method would be wrong for it."""
    config = load_config(source)
    kind, rope = config.model_type, getattr(config, "rope_parameters", None) or {}
    rope = rope.get("rope_type", "default")
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    windows = windows or (kind == "mistral" and config.sliding_window)
    reasons = {
        f"the tree mask has not been checked for {kind} models": kind not in TREE_MODELS,
        f"this {kind} model's attention has a sliding window": windows,
        f"its {rope} position embedding depends on the batch": rope not in STATIC_ROPE,
        f"{attention} attention takes no tree mask": attention not in ("sdpa", "eager"),
    }
    reason = next((why for why, holds in reasons.items() if holds), "")
    require(method != "tree" or not reason, f"--method tree: {reason}; use --method auto")
    why = "as given"
    if method == "auto":
        why = reason or "shared prefixes are computed once"
        method = "tree" if not reason else "sorted" if rope in STATIC_ROPE else "single"
    log.info("embedding method: %s (%s)", method, why)
    model, has_head = _load_model(source, getattr(torch, dtype), attention)
    if has_head and source.pool != "last":
        has_head, why = False, "a score head reads the last token's state"
        log.warning("--pool %s: %s: there will be no reference (rank 0)", source.pool, why)
    # So that no token counts as padding: a model pools the last token before the padding.
    model.config.get_text_config().pad_token_id = -1
    flex = model.config._attn_implementation == "sdpa" and torch.device(device).type == "cuda"
    return Engine(model.to(device).eval(), has_head, method, batch_tokens, flex, source.pool)


def _load_model(source: Source, dtype: torch.dtype, attention: str) -> tuple[Any, bool]:
    """The model and whether its checkpoint has a score head."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    name, loader = source.model, AutoModelForSequenceClassification
    options = {"dtype": dtype, "attn_implementation": attention}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = pretrained(loader, name, source, **options)
    except InputError as error:
        if attention == "sdpa" and "does not support an attention" in str(error.__cause__):
            log.info("%s has no sdpa attention: it takes eager", name)
            return _load_model(source, dtype, "eager")
        if "Unrecognized configuration class" not in str(error.__cause__):
            raise
        model, info = pretrained(AutoModel, name, source, **options)
    for key, found, wanted in sorted(info["mismatched_keys"]):
        sizes = f"{key} is {list(found)}, but {list(wanted)} by its config.json"
        raise InputError(f"{name} cannot be loaded: {sizes}")
    missing = sorted(info["missing_keys"])
    lost = [key for key in missing if not key.startswith("score.")]
    if lost or not hasattr(model, "base_model"):
        lacks = f"its checkpoint lacks {lost[0]}" if lost else "it has no body of its own"
        raise InputError(f"{name} is not a decoder with a score head: {lacks}")
    has_head = hasattr(model, "score") and not missing
    _warn_of_head(name, model, has_head, sorted(info["unexpected_keys"]))
    return model, has_head


def _warn_of_head(name: str, model: Any, has_head: bool, unused: list[str]) -> None:
    """Say what a checkpoint has in place of a score head with one output, and leaves unused."""
    body = f"{model.base_model_prefix}."
    if extra := ", ".join([key for key in unused if key.startswith(body)][:4]):
        said = "WARNING: %s has tensors that its config.json has no place for: %s"
        log.warning(said, name, extra)
    if has_head and len(model.score.weight) == 1:
        return
    known = (body, "score.", "lm_head.")
    others = [key for key in [*model.state_dict(), *unused] if not key.startswith(known)][:4]
    why = "no score head"
    if has_head:
        why = f"a score head of {len(model.score.weight)} outputs, and a reward is one number"
    elif others and model.base_model is not model:
        why = f"no linear layer called score, and {', '.join(others)} is not used in its place"
    log.warning("%s has %s: there will be no reference (rank 0)", name, why)
    if ENCODERS.search(model.config.model_type):
        log.warning("WARNING: %s models are encoders, not trained to say all in the last token, "
                    "which is what is embedded", model.config.model_type)  # fmt: skip
