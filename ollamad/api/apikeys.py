"""What an API key looks like: `odk_ID_SECRET`, both parts random.

The secret has 256 bits, so its SHA-256 is as safe to keep as a slow hash would be, and costs
nothing at each request. The id finds the key in the state, and says nothing about the secret.
"""

import hashlib
import hmac
import secrets
from typing import NamedTuple

from ollamad.core.state import ApiKey, ClusterState

PREFIX = "odk_"
ID_BYTES = 6
SECRET_BYTES = 32


class NewKey(NamedTuple):
    id: str
    text: str  # the whole key, for its owner only
    secret_sha256: str


def new_key() -> NewKey:
    """A key that nobody has yet."""
    key_id, secret = secrets.token_hex(ID_BYTES), secrets.token_urlsafe(SECRET_BYTES)
    return NewKey(key_id, f"{PREFIX}{key_id}_{secret}", _hash(secret))


def find_key(state: ClusterState, text: str) -> ApiKey | None:
    """The key that this text is, whole; None for anything else."""
    if not text.startswith(PREFIX):
        return None
    key_id, _, secret = text.removeprefix(PREFIX).partition("_")
    key = state.api_keys.get(key_id)
    if key is None or not hmac.compare_digest(_hash(secret), key.secret_sha256):
        return None
    return key


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
