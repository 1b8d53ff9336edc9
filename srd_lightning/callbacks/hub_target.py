"""`HubTarget`: a repository on the Hugging Face hub to which a folder goes, and whether it may."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from srd_lightning.errors import SettingError, in_one_line


def is_repo(name: str) -> bool:
    """Return whether a name may be that of a repository on the hub.

    Example:
        >>> is_repo("org/small"), is_repo("runs/first/student")
        (True, False)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@dataclass(frozen=True)
class HubTarget:
    """A model repository on the hub.

    The token is the one of ``hf auth login``, or of the environment variable ``HF_TOKEN``; it is no setting, since
    settings are written into files.

    Args:
        repo: ``organisation/name``, or a name of your own; made if it is not there.
        private: Whether only you, or your organisation, can see it.

    Raises:
        SettingError: The name cannot be one.

    Example:
        >>> HubTarget("me/small").command(Path("runs/student"), leave_out="srd_export.json")
        'hf upload me/small runs/student . --exclude srd_export.json --private'
    """

    repo: str
    private: bool = True

    def __post_init__(self) -> None:
        """Check the name."""
        if not is_repo(self.repo):
            raise SettingError(
                f"push_to.repo must be the name of a repository, such as organisation/name, but is {self.repo!r}; use "
                "letters, digits, '-', '_' and '.'"
            )

    def check(self) -> None:
        """See whether the hub will take a folder.

        Raises:
            SettingError: There is no token or no network, the token may not write there, or the repository is public
                where a private one is asked for.
        """
        if get_token() is None:
            raise SettingError(
                f"push_to needs a token of the hub to write to {self.repo}, but there is none; run `hf auth login`, "
                "set HF_TOKEN, or leave push_to out"
            )
        api = HfApi()
        try:
            known = api.whoami()
            is_private = self._is_private(api)
        except OfflineModeIsEnabled as error:
            raise SettingError(
                f"push_to is to write to {self.repo} on the hub, but HF_HUB_OFFLINE is set; unset it, or leave push_to "
                "out"
            ) from error
        except Exception as error:  # the client of the hub has those of its own client of HTTP
            raise SettingError(
                f"push_to is to write to {self.repo}, but the hub refuses, or cannot be reached "
                f"({in_one_line(error)}); run `hf auth login` where it is the token, or leave push_to out and upload "
                "when training has ended"
            ) from error
        owners = [known.get("name"), *(one.get("name") for one in known.get("orgs", ()))]
        owner, _, named = self.repo.rpartition("/")
        if owner and owner not in owners:
            raise SettingError(
                f"push_to.repo {self.repo} belongs to {owner}, but the token may write for "
                f"{', '.join(map(str, owners))}; name {owners[0]}/{named}, or use another token"
            )
        if known.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise SettingError(
                f"push_to needs a token that may write to {self.repo}, but this one may only read; make one with the "
                "role write on https://huggingface.co/settings/tokens"
            )
        if self.private and is_private is False:
            raise SettingError(
                f"push_to.private asks for a repository that others cannot see, but {self.repo} is there and public; "
                "set push_to.private to false, or name another one"
            )

    def _is_private(self, api: HfApi) -> bool | None:
        """Return whether the repository is private; nothing where it is still to be made."""
        try:
            return bool(api.repo_info(self.repo).private)
        except RepositoryNotFoundError:
            return None

    def upload(self, folder: Path, leave_out: str) -> str:
        """Make the repository if need be, and upload a folder; return its address."""
        api = HfApi()
        repo = api.create_repo(self.repo, private=self.private, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            ignore_patterns=[leave_out],
            commit_message="Student of Selective Reflection Distillation",
        )
        return str(repo)

    def command(self, folder: Path, leave_out: str) -> str:
        """Return the command that does the same later."""
        private = ["--private"] if self.private else []
        return shlex.join(["hf", "upload", self.repo, str(folder), ".", "--exclude", leave_out, *private])
