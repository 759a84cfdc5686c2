"""What `eval-kl` does with its options: a candidate folder or a running server, on the tokens that were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimoquant.cli.files import write_page
from mimoquant.cli.options import (
    ActivationsOption,
    AsServedOption,
    DataColumnOption,
    DenseActivationsOption,
    HeldOutOption,
    HeldOutSequencesOption,
    HeldOutTokensOption,
    JsonOption,
    KvOption,
    PlaceOption,
    QuietOption,
    ReferenceAsServedOption,
    ResumeOption,
    option_value,
)
from mimoquant.cli.terminal import hint_to_resume, printed_last, tell, watcher
from mimoquant.shipped import HELD_OUT_SET, HELD_OUT_TOKENS

if TYPE_CHECKING:
    from mimoquant.assembly.choices import EvaluationChoice, ServerChoice
    from mimoquant.evaluation.documents import EvalFolderDocument, EvalKlDocument, EvalServerDocument


def evaluate(
    reference: Path,
    candidate: Path,
    choice: EvaluationChoice,
    *,
    baseline: Path | None,
    device: str,
    out: Path | None,
    resume: bool,
    html: Path | None,
) -> EvalFolderDocument | None:
    """Walk reference and candidate; None on a rank that does not tell."""
    from mimoquant.assembly.evaluations import evaluate_folder, evaluation_file
    from mimoquant.assembly.files import check_writable
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.team import Team

    with Team.from_environment(resolve_device(device)) as team, hint_to_resume(out is not None and team.leads):
        file = evaluation_file(out, resume)
        if html is not None and team.leads:
            partial = (Path(f"{out}.partial"),) if out else ()
            check_writable(html, (*filter(None, (reference, candidate, baseline)), *partial))
        document = evaluate_folder(
            reference, candidate, choice, team, baseline=baseline, file=file, watcher=watcher(team.leads)
        )
    return document if team.leads else None


def evaluate_server(reference: Path, server: ServerChoice, choice: EvaluationChoice, device: str) -> EvalServerDocument:
    """Walk the reference, and ask a server for what it makes of the same tokens."""
    from mimoquant.assembly.evaluations import evaluate_server as run
    from mimoquant.machine.team import refuse_ranks

    refuse_ranks("eval-kl --server")
    return run(reference, server, choice, device, watcher())


def check_outcome(
    reference: Path, candidate: Path | None, max_kl: float | None, junit: Path | None, card: bool
) -> None:
    """Refuse what could not be written after the walk."""
    from mimoquant.assembly.files import check_writable
    from mimoquant.errors import UsageError

    if junit is not None:
        if max_kl is None:
            raise UsageError(f"--junit {junit}: there is no limit to pass or fail", hint="give --max-kl")
        check_writable(junit, tuple(folder for folder in (reference, candidate) if folder is not None), "--junit")
    if card and candidate is None:
        raise UsageError("--card cannot go with --server", hint="a model card lies in a CANDIDATE folder")
    if card and candidate is not None:
        from mimoquant.output.model_card import quality_place, read_card

        quality_place(read_card(candidate))


def write_outcome(document: EvalKlDocument, candidate: Path | None, junit: Path | None, card: bool) -> None:
    """What `--junit` and `--card` ask for."""
    if junit is not None:
        from mimoquant.report.junit import junit_text

        write_page(junit, junit_text(document), "--junit")
    if card and candidate is not None:
        from mimoquant.output.model_card import write_quality

        write_quality(candidate, document)


def fail_the_gate(document: EvalKlDocument, *, is_lower_bound: bool) -> None:
    """Raise QualityError where a limit was given and is not kept."""
    from mimoquant.errors import QualityError
    from mimoquant.wording import has_interval, interval

    limit, j, broken = document["max_kl"], document["j"]["mean"], document["nonfinite_share"]
    if limit is None:
        return
    if not has_interval(document["j"]):
        ends = interval(document["j"], sequences=document["sequences"])
        tell(f"note: --max-kl is held against the mean; its interval is {ends}")
    if j > limit:
        least = "at least " if is_lower_bound else ""
        over = f"{least}{j:.5f} nats a token, {j - limit:.5f} above the gate of {limit}"
        raise QualityError(f"{document['candidate']}: J is {over}")
    if broken:
        raise QualityError(
            f"{document['candidate']}: {100 * broken:.3g} % of the rows are not finite, J leaves them out"
        )


def eval_kl(
    reference: Annotated[Path, typer.Argument(help="The published checkpoint, in bf16 or FP8.", metavar="REFERENCE")],
    candidate: Annotated[
        Path | None,
        typer.Argument(help="The quantized checkpoint, by any tool; or give --server.", metavar="CANDIDATE"),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Compare with this vLLM or SGLang server instead of a CANDIDATE; J is a lower bound.", metavar="URL"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model to ask for, by its name on the server, where that serves several.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Token ids to ask the server for at each position; by default 256, or what it allows."
        ),
    ] = None,
    data: HeldOutOption = None,
    data_column: DataColumnOption = None,
    sequences: HeldOutSequencesOption = None,
    tokens: HeldOutTokensOption = HELD_OUT_TOKENS,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="Exit with 5 where J is above this limit, in nats per token.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Another quantized checkpoint, measured on the same tokens and compared.")
    ] = None,
    noise_floor: Annotated[
        bool, typer.Option(help="Measure also what the reference differs from itself by rounding alone.")
    ] = True,
    activations: ActivationsOption = None,
    dense_activations: DenseActivationsOption = None,
    kv: KvOption = None,
    as_served: AsServedOption = None,
    reference_as_served: ReferenceAsServedOption = False,
    device: PlaceOption = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Write the result to this file as JSON; a killed run can then be resumed.",
            metavar="FILE",
        ),
    ] = None,
    resume: ResumeOption = False,
    html: Annotated[Path | None, typer.Option(help="Write the report to this file as a page.", metavar="FILE")] = None,
    junit: Annotated[
        Path | None, typer.Option(help="Write to this file, as JUnit XML, whether --max-kl was kept.", metavar="FILE")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write the result into the model card, CANDIDATE/README.md.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure symmetric KL of a checkpoint or server. It is compared with the published checkpoint, on held-out tokens.

    With --out a killed evaluation can be resumed after its last layer: meanwhile FILE.partial holds the hidden states,
    up to 8 bytes x width for each token and checkpoint.
    """
    from mimoquant.assembly.choices import EvaluationChoice, RoundingChoice, ServerChoice
    from mimoquant.assembly.evaluations import check_candidate

    kinds = option_value(activations), option_value(dense_activations), option_value(kv)
    rounding = RoundingChoice(*kinds, as_served, reference_as_served)
    of_candidate = {"--baseline": baseline, "--html": html, "--out": out, "--resume": resume or None}
    check_candidate(candidate, server, {"--model": model, "--top-k": top_k}, of_candidate | rounding.given())
    check_outcome(reference, candidate, max_kl, junit, card)
    data = data or [HELD_OUT_SET]
    choice = EvaluationChoice(data, sequences, tokens, noise_floor, max_kl, data_column, rounding)
    if candidate is None:
        from mimoquant.report.server_text import server_text

        of_server = evaluate_server(reference, ServerChoice(str(server), model, top_k), choice, device)
        with printed_last(of_server, server_text, as_json):
            write_outcome(of_server, candidate, junit, card)
        fail_the_gate(of_server, is_lower_bound=of_server["server"]["is_lower_bound"])
        return
    from mimoquant.report import changes_card, eval_page, eval_text
    from mimoquant.wording import left_out_note

    document = evaluate(
        reference, candidate, choice, baseline=baseline, device=device, out=out, resume=resume, html=html
    )
    if document is None:  # another rank tells
        return
    for note in left_out_note(document["left_out"]):
        tell(f"note: {candidate}: {note}")
    with printed_last(document, eval_text.eval_text, as_json):
        write_outcome(document, candidate, junit, card)
        if html is not None:
            write_page(html, eval_page.eval_page(document, changes_card.changes_part(candidate)))
    fail_the_gate(document, is_lower_bound=False)
