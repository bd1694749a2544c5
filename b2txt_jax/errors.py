"""The errors that a command shows to its user in one line, shared by both packages."""

from lm_server.errors import DAMAGED_ARRAYS as DAMAGED_ARRAYS
from lm_server.errors import UserError as UserError
