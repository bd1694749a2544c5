"""The error of conversions."""

from b2txt_jax.errors import UserError


class ConversionError(UserError, ValueError):
    """A file, run or setting that cannot be converted."""
