"""A repository on the Hub: how a user names it, where its files are, and what its refusals mean.

Key idea: huggingface_hub says which endpoint, token and proxy there are; a token is sent to the Hub's own host alone,
and never told. What the Hub refuses becomes one sentence here, whoever asked.
Reference: huggingface_hub 1.x, `hf_hub_url`, `get_token`, `hf_raise_for_status`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import httpx
from huggingface_hub import constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mimoquant.__version__ import __version__
from mimoquant.errors import MimoquantError, StoppedError, UsageError

# a path has one slash where the address had two
_NAME = re.compile(r"hf:/{1,2}([A-Za-z0-9][\w.-]*/[\w][\w.-]*?)(?:@([\w][\w./-]*))?/?")
RESUME = "run the same command again when the Hub answers; with --resume a run goes on where it stopped"


@dataclass(frozen=True, slots=True)
class Repository:
    """`name`: ORG/NAME. `revision`: a branch, tag or commit; None for the main branch."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"hf://{self.name}" + (f"@{self.revision}" if self.revision else "")

    @property
    def endpoint(self) -> str:
        return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT or "https://huggingface.co").rstrip("/")

    @property
    def listing(self) -> str:
        """Where the Hub says of which commit the revision is, and which files it has."""
        of = f"/revision/{quote(self.revision, safe='')}" if self.revision else ""
        return f"{self.endpoint}/api/models/{self.name}{of}?blobs=true"

    def url_of(self, file: str) -> str:
        return hf_hub_url(self.name, file, revision=self.revision, endpoint=self.endpoint)

    def headers_for(self, url: str) -> dict[str, str]:
        """With the user's token where the Hub itself is asked, and nobody else."""
        headers = {"user-agent": f"mimoquant/{__version__}", "accept-encoding": "identity"}
        of_hub = urlsplit(url)[:2] == urlsplit(self.endpoint)[:2]
        token = get_token() if of_hub and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else None
        return headers | ({"authorization": f"Bearer {token}"} if token else {})


def parse(text: str) -> Repository:
    """What `hf://ORG/NAME[@REVISION]` names. Raises UsageError where it is of another form."""
    found = _NAME.fullmatch(text)
    if found is None or ".." in text:
        raise UsageError(
            f"{text}: is no repository on the Hub", hint="name it hf://ORG/NAME, or hf://ORG/NAME@REVISION"
        )
    return Repository(found[1], found[2])


def check_settings(repository: Repository) -> None:
    """Raises UsageError where the environment holds settings that nothing can be asked with: neither waiting nor
    another attempt would mend them, and what a client says of a token that it cannot send has that token in it."""
    endpoint, hint = repository.endpoint, "an endpoint is https://HOST, with a path where the mirror has one"
    try:
        place, port = httpx.URL(endpoint), urlsplit(endpoint).port
    except (httpx.InvalidURL, ValueError) as error:
        raise UsageError(f"{endpoint} in HF_ENDPOINT: is no address ({error})", hint=hint) from error
    if place.scheme not in ("http", "https") or not place.host or place.query or port == 0:
        raise UsageError(f"{endpoint} in HF_ENDPOINT: is no address of a Hub", hint=hint)
    try:
        token = get_token() or ""
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(
            f"the token's file {constants.HF_TOKEN_PATH} cannot be read ({why})",
            hint="hf auth login, or set HF_TOKEN",
        ) from None
    if not (token.isascii() and token.isprintable()):
        raise UsageError(
            "the token of the Hub has characters that no token has",
            hint="set HF_TOKEN anew, or hf auth login",
        )
    try:
        get_session()
    except (ImportError, ValueError, OSError) as error:  # no SOCKS, no such proxy, no such certificates
        raise UsageError(
            f"{repository}: the Hub's client cannot be set up ({error})",
            hint="proxies and SSL_CERT_FILE are the environment's; a SOCKS proxy needs pip install httpx[socks]",
        ) from error


def refused(repository: Repository, error: Exception) -> MimoquantError:
    """What an error of the Hub's client means for the user."""
    if isinstance(error, OfflineModeIsEnabled):
        return offline(repository)
    if isinstance(error, LocalTokenNotFoundError):
        return UsageError(f"{repository}: needs a token, and there is none", hint="hf auth login, or set HF_TOKEN")
    if isinstance(error, GatedRepoError):
        return UsageError(
            f"{repository}: is gated, and this {'token' if get_token() else 'machine, which has no token,'} may not "
            "read it",
            hint=f"ask for access at {repository.endpoint}/{repository.name}, then hf auth login or set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return UsageError(
            f"hf://{repository.name}: has no revision {repository.revision or 'main'}",
            hint="name a branch, a tag or a whole commit that is still there",
        )
    if isinstance(error, RepositoryNotFoundError | DisabledRepoError):
        known = "with the token that is set" if get_token() else "without a token"
        return UsageError(
            f"{repository}: there is no such model at {repository.endpoint} that can be read {known}",
            hint="check the name; for a private one hf auth login, or set HF_TOKEN",
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401 and get_token():
        return UsageError(
            f"{repository}: {repository.endpoint} does not take the token that is set",
            hint="it may have ended: hf auth login, set HF_TOKEN anew, or unset it for what is public",
        )
    status = f"status {error.response.status_code}" if isinstance(error, HfHubHTTPError) else type(error).__name__
    return StoppedError(f"{repository}: {repository.endpoint} cannot be asked ({status})", hint=RESUME)


def offline(repository: Repository) -> UsageError:
    return UsageError(
        f"{repository}: is on the Hub, and HF_HUB_OFFLINE forbids to ask it",
        hint="unset HF_HUB_OFFLINE, or give a folder that was downloaded",
    )


NETWORK_ERRORS = (HfHubHTTPError, httpx.HTTPError, httpx.InvalidURL, OfflineModeIsEnabled, LocalTokenNotFoundError)
