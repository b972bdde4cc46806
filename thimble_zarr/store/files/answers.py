"""What a server's answer means, in words. The answer itself is not shown: it may repeat keys."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from thimble_zarr.errors import ThimbleError
from thimble_zarr.format.location import Url
from thimble_zarr.store.files.base import BusyError, PlaceError

_DENIED = "check what the environment says, and who may do this (docs/remote.md)"
_OLD = "the credentials have expired; get new ones"
_KEYS = "the server does not accept the credentials; check what the environment says"

_MEANINGS: dict[str, str] = {
    "NoSuchBucket": "there is no such bucket",
    "ExpiredToken": _OLD,
    "TokenRefreshRequired": _OLD,
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
    "InvalidAccessKeyId": _KEYS,
    "InvalidToken": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "AuthorizationHeaderMalformed": f"{_KEYS}, AWS_REGION too",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "AccessDenied": f"access is denied; {_DENIED}",
    "401": f"it needs credentials; {_DENIED}",
    "403": f"access is denied; {_DENIED}",
    "408": "the server was too slow; try again later",
    "429": "the server has too much to do, and was asked often enough; try again later",
    "SlowDown": "the server has too much to do, and was asked often enough; try again later",
    "503": "the server has too much to do, and was asked often enough; try again later",
    "5..": "the server failed; try again later",
    "dns error": "there is no server of that name",
    "Connection refused": "no server listens there; try again later",
    "timed out": "the server did not answer in time; try again later",
    "TimedOut": "the server did not answer in time; try again later",
    "missing region": "set AWS_REGION",
    "without LOCATION": "the bucket is in another region; set AWS_REGION",
    "Range request not supported": "the server returns whole files only; it must serve ranges",
    "IncompleteBody": "the connection was cut; try again later",
    "IncompleteMessage": "the connection was cut; try again later",
    "connection closed": "the connection was cut; try again later",
    "connection error": "the connection was cut; try again later",
    "error sending request": "the server cannot be reached; try again later",
}
"""What is in an answer, or in what the library makes of it: the first that is found counts."""

_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status code: (\d{3})")


@contextmanager
def named_errors(path: Url, key: str) -> Iterator[None]:
    """Raise FileNotFoundError where there is no file, and else PlaceError with what is wrong."""
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise PlaceError(f"{path}: {_MEANINGS['NoSuchBucket']}") from None
        raise FileNotFoundError(f"there is no {key or 'file'}") from None
    except (OSError, MemoryError, ThimbleError):
        raise
    except Exception as error:
        # Without the error it comes from: that has the whole answer.
        words = _in_words(str(error))
        kind = BusyError if "try again later" in words else PlaceError
        raise kind(f"{path / key if key else path}: {words}") from None


def _in_words(text: str) -> str:
    """Return what an error of the library means."""
    code, status = _CODE.search(text), _STATUS.search(text)
    for of in (code, status):
        if of is not None and of[1] in _MEANINGS:
            return _MEANINGS[of[1]]
    if status is not None and status[1].startswith("5"):
        return f"{_MEANINGS['5..']} (status {status[1]})"
    for sign, meaning in _MEANINGS.items():
        if sign in text and not sign.isdecimal():
            return meaning
    return f"the server refused (status {status[1]})" if status else "it cannot be reached"
