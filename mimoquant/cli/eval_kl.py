"""What `eval-kl` does with its options: a candidate folder or a running server, on the tokens that were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimoquant.cli.files import check_writable, write_page
from mimoquant.cli.terminal import Lines, hint_to_resume, tell

if TYPE_CHECKING:
    from mimoquant.calibration.tokens import TokenSet


def check_candidate(
    candidate: Path | None, server: str | None, of_server: dict[str, Any], of_candidate: dict[str, Any]
) -> None:
    """Refuse options that contradict each other."""
    from mimoquant.errors import UsageError

    if candidate is None and server is None:
        raise UsageError(
            "there is nothing to compare the reference with", hint="give a CANDIDATE folder, or --server URL"
        )
    if candidate is not None and server is not None:
        raise UsageError(f"{candidate} and --server {server}: only one of them can be the candidate")
    for option, value in (of_candidate if candidate is None else of_server).items():
        if value is not None:
            raise UsageError(f"{option} cannot go with {'--server' if candidate is None else 'a CANDIDATE folder'}")


def _check_files(checkpoints: tuple[Path, ...], out: Path | None, resume: bool, html: Path | None) -> None:
    """Refuse before a long run what would only fail after it."""
    from mimoquant.errors import UsageError

    if resume and out is None:
        raise UsageError(
            "--resume: only an evaluation with --out leaves something to go on from",
            hint="give the --out that the interrupted one had",
        )
    if out is not None:
        if out.exists():
            raise UsageError(f"--out {out}: exists already", hint="choose another name or remove it")
        check_writable(out, checkpoints, "--out")
        checkpoints += (Path(f"{out}.partial"),)
    if html is not None:
        check_writable(html, checkpoints)


def load_held_out(
    reference: Path, data: list[str], sequences: int | None, tokens: int, vocab: int, leads: bool = True
) -> TokenSet:
    """The tokens that were asked for; what was too short for one sequence is told."""
    from mimoquant.calibration.tokens import load_tokens

    loaded = load_tokens(data, reference, sequences=sequences, tokens=tokens, vocab=vocab)
    if loaded.left_out and leads:
        tell(f"note: too few tokens for one sequence of {tokens}: {', '.join(loaded.left_out)}")
    return loaded


def evaluate(
    reference: Path,
    data: list[str],
    sequences: int | None,
    tokens: int,
    candidate: Path,
    baseline: Path | None,
    noise_floor: bool,
    device: str,
    out: Path | None,
    resume: bool,
    html: Path | None,
) -> dict[str, Any] | None:
    """Walk reference and candidate; None on a rank that does not tell."""
    from mimoquant.calibration.tokenizer import decoder_of
    from mimoquant.evaluation.eval_kl import eval_kl as run
    from mimoquant.evaluation.eval_kl import kept_bytes, open_layout
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.team import Team
    from mimoquant.output.quantize_report import size

    place, lines = resolve_device(device), Lines()
    with Team.from_environment(place) as team, hint_to_resume(out is not None and team.leads):
        if team.leads:
            _check_files(tuple(filter(None, (reference, candidate, baseline))), out, resume, html)
        layout = open_layout(reference)
        loaded = load_held_out(reference, data, sequences, tokens, layout.geometry.vocab, team.leads)
        if out is not None and team.leads:
            kept = kept_bytes(layout, loaded, 2 if baseline is None else 3, noise_floor)
            tell(f"note: up to {size(2 * kept)} of hidden states will lie in {out}.partial")
        shown = (lambda layer, layers: lines(f"layer {layer}", layer + 1, layers)) if team.leads else None
        facts = run(reference, candidate, loaded, baseline=baseline, device=place, noise_floor=noise_floor,
                    decode=decoder_of(reference), progress=shown, team=team, out=out, resume=resume)  # fmt: skip
    return facts if team.leads else None


def evaluate_server(
    reference: Path,
    data: list[str],
    sequences: int | None,
    tokens: int,
    url: str,
    model: str | None,
    top_k: int | None,
    device: str,
) -> dict[str, Any]:
    """Walk the reference, and ask a server for what it makes of the same tokens."""
    from mimoquant.evaluation.eval_kl import open_layout
    from mimoquant.evaluation.eval_server import eval_server
    from mimoquant.evaluation.server import connect
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.team import refuse_ranks

    refuse_ranks("eval-kl --server")

    place, vocab = resolve_device(device), open_layout(reference).geometry.vocab
    server = connect(
        url, model, top_k=top_k, tokens=tokens, vocab=vocab
    )  # before the data: a typing error is told soon
    if top_k is None:
        tell(f"note: {server.engine} is asked for {server.top_k} ids a position")
    loaded, lines = load_held_out(reference, data, sequences, tokens, vocab), Lines()
    return eval_server(reference, server, loaded, device=place,
                       progress=lambda layer, layers: lines(f"layer {layer}", layer + 1, layers),
                       asked=lambda done, all_: lines(f"sequence {done}", done, all_))  # fmt: skip


def check_outcome(
    reference: Path, candidate: Path | None, max_kl: float | None, junit: Path | None, card: bool
) -> None:
    """Refuse what could not be written after the walk."""
    from mimoquant.errors import UsageError

    if junit is not None:
        if max_kl is None:
            raise UsageError(f"--junit {junit}: there is no limit to pass or fail", hint="give --max-kl")
        check_writable(junit, tuple(folder for folder in (reference, candidate) if folder is not None), "--junit")
    if card and candidate is None:
        raise UsageError("--card cannot go with --server", hint="a model card lies in a CANDIDATE folder")
    if card and candidate is not None:
        from mimoquant.output.model_card import quality_place

        quality_place(_read_card(candidate))


def write_outcome(facts: dict[str, Any], candidate: Path | None, junit: Path | None, card: bool) -> None:
    """What `--junit` and `--card` ask for."""
    if junit is not None:
        from mimoquant.report.junit import junit_text

        write_page(junit, junit_text(facts), "--junit")
    if card and candidate is not None:
        from mimoquant.checkpoint.writer import write_file_durably
        from mimoquant.output.model_card import with_quality

        write_file_durably(candidate / "README.md", with_quality(_read_card(candidate), facts).encode())


def _read_card(candidate: Path) -> str:
    from mimoquant.errors import UsageError

    try:
        return (candidate / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--card: {candidate}/README.md cannot be read ({error})",
                         hint="only quantize writes one") from error  # fmt: skip
