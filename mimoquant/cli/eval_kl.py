"""What `eval-kl` does with its options: a candidate folder or a running server, on the tokens that were asked for."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimoquant.cli.files import check_writable, write_page
from mimoquant.cli.options import (
    HeldOutOption,
    HeldOutSequencesOption,
    HeldOutTokensOption,
    JsonOption,
    PlaceOption,
    QuietOption,
    ResumeOption,
)
from mimoquant.cli.terminal import Lines, hint_to_resume, print_document, tell

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
    from mimoquant.wording import size

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
        facts = run(
            reference,
            candidate,
            loaded,
            baseline=baseline,
            device=place,
            noise_floor=noise_floor,
            decode=decoder_of(reference),
            progress=shown,
            team=team,
            out=out,
            resume=resume,
        )
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
    return eval_server(
        reference,
        server,
        loaded,
        device=place,
        progress=lambda layer, layers: lines(f"layer {layer}", layer + 1, layers),
        asked=lambda done, all_: lines(f"sequence {done}", done, all_),
    )


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
        raise UsageError(
            f"--card: {candidate}/README.md cannot be read ({error})", hint="only quantize writes one"
        ) from error


def eval_kl(
    reference: Annotated[Path, typer.Argument(help="The published checkpoint.", metavar="REFERENCE")],
    candidate: Annotated[
        Path | None, typer.Argument(help="The quantized one, by any tool; or give --server.", metavar="CANDIDATE")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Score this vLLM or SGLang server instead; J is a lower bound.", metavar="URL")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The server's name for it, if it serves several.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Ids a position; by default 256 or what is allowed.")] = None,
    data: HeldOutOption = None,
    sequences: HeldOutSequencesOption = None,
    tokens: HeldOutTokensOption = 512,
    max_kl: Annotated[float | None, typer.Option(min=0, help="Exit with 5 if J is above this.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Another candidate, compared on the same tokens.")] = None,
    noise_floor: Annotated[bool, typer.Option(help="Measure what the reference differs from itself.")] = True,
    device: PlaceOption = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the JSON here; makes it resumable.", metavar="FILE")
    ] = None,
    resume: ResumeOption = False,
    html: Annotated[Path | None, typer.Option(help="Write the report page here.", metavar="FILE")] = None,
    junit: Annotated[
        Path | None, typer.Option(help="Write --max-kl's outcome here as JUnit XML.", metavar="FILE")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the outcome into CANDIDATE's README.md.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure symmetric KL of a checkpoint or server. The reference is the published one in bf16, the tokens held out.

    With --out a killed evaluation can be resumed after its last layer: meanwhile FILE.partial holds the hidden states,
    up to 8 bytes x width for each token and checkpoint.
    """
    from mimoquant.errors import QualityError
    from mimoquant.report import changes_card, eval_page, eval_text, server_text

    begin = time.monotonic()
    check_candidate(
        candidate,
        server,
        {"--model": model, "--top-k": top_k},
        {"--baseline": baseline, "--html": html, "--out": out, "--resume": resume or None},
    )
    check_outcome(reference, candidate, max_kl, junit, card)
    where = (reference, data or ["heldout-v1"], sequences, tokens)
    if candidate is not None:
        facts = evaluate(*where, candidate, baseline, noise_floor, device, out, resume, html)
    else:
        facts = evaluate_server(*where, str(server), model, top_k, device)
    if facts is None:  # another rank tells
        return
    if facts.get("activations_quantized"):
        tell(f"note: {candidate}: its config quantizes activations too; J is of its weights alone")
    facts["max_kl"], j, broken = max_kl, facts["j"]["mean"], facts["nonfinite_share"]
    facts["passed"] = None if max_kl is None else j <= max_kl and not broken
    facts["elapsed_s"] = round(time.monotonic() - begin, 3)
    facts["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if html is not None:
        write_page(html, eval_page.eval_page(facts, changes_card.changes_part(Path(facts["candidate"]))))
    print_document(facts, eval_text.eval_text if candidate is not None else server_text.server_text, as_json)
    write_outcome(facts, candidate, junit, card)
    if max_kl is not None and j > max_kl:
        least = "at least " if facts.get("server", {}).get("is_lower_bound") else ""
        over = f"{least}{j:.5f} nats a token, {j - max_kl:.5f} above the gate of {max_kl}"
        raise QualityError(f"{facts['candidate']}: J is {over}")
    if max_kl is not None and broken:
        raise QualityError(f"{facts['candidate']}: {100 * broken:.3g} % of the rows are not finite, J leaves them out")
