"""What goes wrong while converting."""

from b2txt_jax.errors import UserError


class ConversionError(UserError, ValueError):
    """Something that cannot be converted; says what was found, what was needed, what to do."""
