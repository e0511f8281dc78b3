"""Optional dependencies, asked for by the name of their extra."""

import importlib.util


def require_extra(extra: str, *modules: str) -> None:
    """Raises `ImportError` with the line to type if a module is missing.

    Args:
        extra: The extra that installs the modules: "train", "eval", "test", "docs".
        *modules: Names of top-level modules.

    Raises:
        ImportError: If one of them is not installed.

    Examples:
        >>> require_extra("train", "torch")
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{', '.join(missing)} is missing; type: pip install 'dmdkit[{extra}]'"
        )
