"""Bytes of a source on the Hub are those of the folder, whatever goes wrong on the way; or an error says what did."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from hub_server import COMMIT, OTHER_COMMIT, REPO, HubServer, serving
from huggingface_hub import close_session
from small_runs import small_checkpoint, with_nested_files

from mimoquant.checkpoint import ranges
from mimoquant.checkpoint.folders import read_inside
from mimoquant.checkpoint.hf_files import side_files
from mimoquant.checkpoint.hub import opened
from mimoquant.checkpoint.index import open_index
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError, MimoquantError, StoppedError, UsageError

SHARD = "model-1.safetensors"
SOURCE = f"hf://{REPO}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_nested_files(small_checkpoint(fp8=True).save(tmp_path_factory.mktemp("hub") / "source"))


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(ranges, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(ranges, "SMALLEST_PART", 2**14)  # so that a small shard takes several requests
    with serving(folder) as server:
        yield server
        assert not server.strangers


def read_all(folder: Path) -> dict[str, bytes]:
    """Every tensor, by one call, and the first rows of some by themselves."""
    with CheckpointReader(open_index(folder)) as reader:
        infos = reader.index.tensors.values()
        arrays = [np.empty(info.size_bytes, np.uint8) for info in infos]
        reader.read_many(zip(infos, arrays, strict=True))
        return {info.name: array.tobytes() for info, array in zip(infos, arrays, strict=True)}


class Faults:
    """Of the payload's requests, by their number; `left`: those that have not happened."""

    def __init__(self, answers: dict[int, str]) -> None:
        self.left, self.count = dict(answers), 0

    def __call__(self, name: str, begin: int, end: int) -> str | None:
        if name != SHARD or begin <= 8:  # the first two are for the header
            return None
        self.count += 1
        return self.left.pop(self.count - 1, None)


def test_a_source_has_the_headers_tensors_and_side_files_of_its_folder(hub: HubServer, folder: Path) -> None:
    near = open_index(folder)
    with opened(SOURCE) as place:
        far = open_index(place)
        assert (far.tensors, far.file_sizes, far.header_sha256) == (near.tensors, near.file_sizes, near.header_sha256)
        assert far.stamps() == {SHARD: f"{len(hub.content[SHARD])} bytes of etag {hub.sha256[SHARD]}"}
        assert side_files(place, far.file_sizes) == side_files(folder, near.file_sizes)
        assert read_all(place) == read_all(folder)
        assert not (place / SHARD).exists()
    assert not place.exists()


def test_each_byte_is_asked_for_once_over_one_redirect(hub: HubServer) -> None:
    with opened(SOURCE) as place:
        read_all(place)
        first = min(info.offset for info in open_index(place).tensors.values())
    asked = sorted(one for one in hub.asked[SHARD] if one[0] >= first)
    assert len(asked) >= ranges.CONNECTIONS
    assert [begin for begin, _ in asked] == [first, *(end for _, end in asked[:-1])]
    assert asked[-1][1] == len(hub.content[SHARD])
    assert hub.resolved.count(SHARD) == 1


@pytest.mark.parametrize("fault", ["drop 1000", "drop 0", "429 0", "429", "500", "503 0", "403", "trickle 9"])
def test_what_breaks_is_asked_for_again(hub: HubServer, folder: Path, fault: str) -> None:
    hub.fault = faults = Faults({0: fault, 2: fault, 7: fault})
    with opened(SOURCE) as place:
        assert read_all(place) == read_all(folder)
    assert not faults.left
    assert (hub.resolved.count(SHARD) > 1) == (fault == "403"), "an address that is outdated is asked for anew"


@pytest.mark.parametrize(
    ("status", "headers", "waits"),
    [
        (429, {"retry-after": "7"}, 7),
        (429, {"ratelimit": '"resolvers";r=0;t=211'}, 212),
        (429, {"retry-after": "7", "ratelimit": '"api";r=0;t=211'}, 7),
        (429, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        (429, {b"retry-after": b"\xb2"}, None),
        (503, {"ratelimit": '"api";r=9;t=211'}, None),
    ],
)
def test_the_hub_says_how_long_to_wait(
    status: int, headers: dict[str, str] | dict[bytes, bytes], waits: float | None
) -> None:
    with pytest.raises(ranges._Again) as caught:
        ranges.check_status(httpx.Response(status, headers=headers))
    assert caught.value.wait_s == waits


def test_a_broken_connection_goes_on_where_it_broke(hub: HubServer) -> None:
    hub.fault = Faults({3: "drop 5000"})
    with opened(SOURCE) as place:
        read_all(place)
    ends = [end for _, end in hub.asked[SHARD]]
    (twice,) = {end for end in ends if ends.count(end) > 1}
    first, second = (begin for begin, end in hub.asked[SHARD] if end == twice)
    assert second == first + 5000


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("whole", StoppedError, "the answer has status 200"),
        ("range", StoppedError, r"were asked for, the answer has 0 to"),
        ("coded", StoppedError, "in gzip"),
        ("longer", CheckpointError, "was exchanged while it was read, its size was"),
        ("500", StoppedError, "after 6 attempts .status 500."),
        ("drop 0", StoppedError, "after 6 attempts .RemoteProtocolError."),
    ],
)
def test_an_answer_that_is_not_the_range_is_no_data(
    hub: HubServer, folder: Path, fault: str, kind: type[MimoquantError], says: str
) -> None:
    with opened(SOURCE) as place:
        open_index(place)
        hub.fault = lambda name, begin, end: fault if name == SHARD else None
        with pytest.raises(kind, match=says):
            read_all(place)


def test_a_file_that_is_exchanged_is_told(hub: HubServer) -> None:
    with opened(SOURCE) as place:
        index = open_index(place)
        with CheckpointReader(index) as reader:
            reader.read("model.norm.weight")
            hub.etags[SHARD] = "other"
            with pytest.raises(CheckpointError, match=r"its etag was cdn-model-1.safetensors, is now other"):
                reader.read("lm_head.weight")
    hub.etags.clear()
    hub.linked[SHARD] = "0" * 64
    with opened(SOURCE) as place, pytest.raises(CheckpointError, match="is now 0000"):
        open_index(place)


def test_a_size_that_the_header_contradicts_is_told(hub: HubServer) -> None:
    hub.content[SHARD] = hub.content[SHARD][:-4]
    with opened(SOURCE) as place, pytest.raises(CheckpointError, match="the header describes"):
        open_index(place)


@pytest.mark.parametrize("name", ["../stray.json", "/etc/stray.json", "a/../../stray.json", "a\\b.json", "x" * 300])
def test_names_that_lead_out_are_refused(hub: HubServer, name: str, tmp_path: Path) -> None:
    hub.listed["config.json"] = {"rfilename": name}
    with pytest.raises(CheckpointError, match=r"leads out of the checkpoint folder|too long"), opened(SOURCE):
        pass


@pytest.mark.parametrize(
    "names",
    [["./config.json"], ["a//b.json"], ["a/./b.json"], ["a/"], ["."], ["config.json/b.json"], ["a/b", "a/b/c/d.json"]],
)
def test_names_that_could_lie_over_another_are_refused(hub: HubServer, names: list[str]) -> None:
    hub.content |= dict.fromkeys(names, b"{}")
    with pytest.raises(CheckpointError, match=r"is no name of a file|as a file and as the folder of"), opened(SOURCE):
        pass


def test_a_file_that_is_listed_twice_is_refused(hub: HubServer) -> None:
    hub.listed[SHARD] = {"rfilename": "config.json"}
    with pytest.raises(CheckpointError, match=r"files by .* names"), opened(SOURCE):
        pass


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("keeps", [False, True])
def test_a_setting_that_is_too_large_is_not_fetched(hub: HubServer, tmp_path: Path, name: str, keeps: bool) -> None:
    hub.content.setdefault(name, b"{}")
    hub.listed[name] = {"size": 10**12}
    with (
        pytest.raises(CheckpointError, match="1000000000000 bytes, more than"),
        opened(SOURCE, tmp_path / "kept" if keeps else None) as place,
    ):
        read_inside(place, name, 100_000_000)
    assert name not in hub.resolved


def test_a_shard_that_the_repository_lacks_is_told(hub: HubServer) -> None:
    hub.content["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "gone.safetensors"}}).encode()
    with opened(SOURCE) as place, pytest.raises(CheckpointError, match=r"gone\.safetensors is not in the repository"):
        open_index(place)


@pytest.mark.parametrize("changes", [{"size": None}, {"size": -1}, {"size": "9"}, {"blobId": 7}, {"lfs": 3}])
def test_a_listing_that_is_not_the_hubs_is_refused(hub: HubServer, changes: dict[str, object]) -> None:
    hub.listed["config.json"] = changes
    with pytest.raises(CheckpointError, match="does not list its files with their sizes"), opened(SOURCE):
        pass


def test_a_small_file_with_another_hash_is_refused(hub: HubServer) -> None:
    hub.content["config.json"] = hub.content["config.json"].replace(b"4", b"5", 1)
    hub.listed["config.json"] = {"blobId": "0" * 40}
    hub.linked["config.json"] = "0" * 40
    with pytest.raises(CheckpointError, match="the Hub's record has 0000"), opened(SOURCE):
        pass


@pytest.mark.parametrize(
    ("refusal", "kind", "says"),
    [
        ((404, "RepoNotFound"), UsageError, "there is no such model"),
        ((401, "RepoNotFound"), UsageError, "there is no such model at .* that can be read without a token"),
        ((403, "GatedRepo"), UsageError, "is gated"),
        ((404, "RevisionNotFound"), UsageError, "has no revision main"),
        ((403, ""), StoppedError, "cannot be asked .status 403."),
        ((500, ""), StoppedError, "after 6 attempts .status 500."),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: HubServer, refusal: tuple[int, str], kind: type[MimoquantError], says: str
) -> None:
    hub.refuse = refusal
    with pytest.raises(kind, match=says) as caught, opened(SOURCE):
        pass
    assert caught.value.hint


def test_revisions_are_pinned(hub: HubServer) -> None:
    for revision in ("", "@main", "@v1", f"@{COMMIT}"):
        with opened(SOURCE + revision) as place:
            hub.fault = None
            assert open_index(place).tensors
    with pytest.raises(UsageError, match="has no revision v2"), opened(f"{SOURCE}@v2"):
        pass
    with opened(SOURCE) as place:
        hub.commit = OTHER_COMMIT  # a push, meanwhile
        with pytest.raises(CheckpointError, match="is no longer there"):
            open_index(place)


@pytest.mark.parametrize(
    "name", ["hf://micro", "hf://a/b/c", "hf://a/b@../x", "hf://a/b@", "hf:///b", "hf://a/..", "hf://"]
)
def test_other_forms_of_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no repository on the Hub"), opened(name):
        pass


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"HF_ENDPOINT": "127.0.0.1:80"}, "is no address"),
        ({"HF_ENDPOINT": "ftp://hub"}, "is no address of a Hub"),
        ({"HF_ENDPOINT": "http://"}, "is no address of a Hub"),
        ({"HF_ENDPOINT": "http://hub:99999"}, "is no address .Port"),
        ({"HF_ENDPOINT": "http://user:hf_secret@[hub"}, "is no address"),
        ({"HF_TOKEN": "hf_secret\xe9"}, "the token of the Hub has characters"),
        ({"HF_TOKEN": "hf_secret\x07"}, "the token of the Hub has characters"),
        ({"ALL_PROXY": "gopher://user:hf_secret@127.0.0.1:1"}, "the Hub's client cannot be set up"),
        ({"HTTPS_PROXY": "socks5://user:hf_secret@127.0.0.1:1"}, "the Hub's client cannot be set up"),
    ],
)
def test_settings_that_nothing_can_be_asked_with_are_told_at_once(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], says: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    close_session()  # the client takes its proxies when it is made
    with pytest.raises(UsageError, match=says) as caught, opened(SOURCE):
        pass
    assert caught.value.hint and "hf_secret" not in str(caught.value)


def test_a_token_that_the_hub_does_not_take_is_told(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuse = (401, "")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(UsageError, match=r"there is no such model|does not take the token"), opened(SOURCE):
        pass
    monkeypatch.setattr("hub_server.MESSAGE", "Invalid credentials in Authorization header")
    with pytest.raises(UsageError, match="does not take the token that is set"), opened(SOURCE):
        pass


def test_a_token_goes_to_the_hub_alone(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(UsageError, match="without a token"), opened(SOURCE):
        pass
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with opened(SOURCE) as place:
        assert read_all(place) == read_all(folder)
    hub.refuse = (403, "GatedRepo")
    with pytest.raises(UsageError) as caught, opened(SOURCE):
        pass
    assert "hf_secret" not in str(caught.value) + str(caught.value.hint)
