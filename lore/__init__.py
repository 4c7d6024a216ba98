import sys

if sys.version_info < (3, 11):  # noqa: UP036 (whoever has an older one is told so)
    raise SystemExit(f"error: Python 3.11 or newer is needed; this is {sys.version.split()[0]}")
