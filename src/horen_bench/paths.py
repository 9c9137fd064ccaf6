"""Where the files that travel with the package are, from a checkout and from an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).parent
_CHECKOUT = _PACKAGE.parents[1]


def resource(name: str) -> Path:
    """Path of the top-level folder `conf`, `data` or `baselines`.

    A wheel holds them inside the package; an editable install reads them from the checkout.

    Raises:
        FileNotFoundError: the installation is broken.
    """
    for root in (_PACKAGE, _CHECKOUT):
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"horen_bench was installed without its '{name}' folder; install it again")
