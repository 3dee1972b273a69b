"""Verbs about finished models: choose, export, pack."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pbkd.cli.app import app
from pbkd.cli.common import print_table, shown, this_workspace
from pbkd.errors import BudgetError


@app.command()
def pick(
    max_bytes: Annotated[str | None, typer.Option(help="Of the file: 1MB, or 25%.")] = None,
    min_accuracy: Annotated[
        str | None, typer.Option(help="On the validation split: 0.9, or 90%.")
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="Per batch, measured on this machine: 5ms, or 50%.")
    ] = None,
    max_parameters: Annotated[str | None, typer.Option(help="500k, or 25%.")] = None,
    max_macs: Annotated[str | None, typer.Option(help="Of one image: 40M, or 25%.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Of the latency. [default: the smallest measured]")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads of the latency. [default: on a GPU, else the fewest measured]"
        ),
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="Of the latency: pytorch, onnxruntime or onnxruntime-int8.")
    ] = "pytorch",
    alias: Annotated[str | None, typer.Option(help="Alias to move to the choice.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="New folder for the choice's files, for `pbkd.load`.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Model in the registry. [default: register.name]")
    ] = None,
    uri: Annotated[
        str | None, typer.Option(help="Of the registry. [default: MLFLOW_TRACKING_URI, or here]")
    ] = None,
) -> None:
    """Choose among the registered students, and say why it is this one.

    The most accurate on the validation split within all limits; with --min-accuracy alone, the
    smallest file. Shares (25%) are of the teacher's figures. The test accuracy is shown beside.

    Example: `pbkd pick --max-bytes 1MB --min-accuracy 0.9 --max-latency 5ms --export exported`
    """
    from pbkd import exporting, picking

    if uri is not None:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    wanted = picking.wanted_from(
        {
            "parameters": max_parameters,
            "macs": max_macs,
            "bytes": max_bytes,
            "latency": max_latency,
        },
        min_accuracy,
        batch_size,
        threads,
        runtime,
    )
    picking.check_alias(alias)
    if export is not None:
        exporting.check_free(export)
    workspace = this_workspace()
    answer = picking.pick(workspace, picking.model_name(workspace, name), wanted)
    print_table(answer.table)
    if answer.version is None:
        for note in answer.sentences[1:]:
            print(note)
        raise BudgetError(answer.sentences[0])
    for sentence in answer.sentences:
        print(sentence)
    if alias is not None:
        picking.move_alias(workspace, answer.version, alias)
        print(f"Alias {alias} is now version {answer.version.number}.")
    if export is not None:
        exporting.export(workspace, answer.version, export)
        print(f'Exported to {shown(export)}; load it: pbkd.load("{shown(export)}")')
    else:
        print(f'Load it: pbkd.load("{answer.version.uri}")')
    print(f"Serve it: mlflow models serve -m {answer.version.uri} --env-manager local")


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A student's name, a folder, or models:/NAME/VERSION.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder. [default: exported/MODEL]")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="onnx, or pt2 (torch.export).")] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Write an int8 ONNX file, too; needs the prepared data.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option(help="Import the function that builds a network of your own.")
    ] = False,
) -> None:
    """Write a model as ONNX or torch.export, and compare it with the model itself.

    Example: `pbkd export half --int8 -o half-onnx`
    """
    from pbkd.export_model import default_folder, export_model, format_of
    from pbkd.loading import load

    written_as = format_of(format_, int8=int8)
    folder = output if output is not None else default_folder(model)
    loaded = load(model, allow_code=allow_code)
    exported = export_model(this_workspace(), loaded, folder, written_as, int8=int8)
    for sentence in exported.sentences:
        print(sentence)
    print(f"Exported to {shown(folder)}")


@app.command()
def pack(
    model: Annotated[str, typer.Argument(help="A folder with model.json, or a student's name.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write, or to replace.")
    ] = Path("model.pbkd"),
) -> None:
    """Write a model as one small file, entropy-coded and exact; docs/format.md.

    Example: `pbkd pack half -o half.pbkd`
    """
    from pbkd.packing import pack_folder
    from pbkd.report.numbers import size_text

    packed = pack_folder(model, output)
    bits = 8 * packed.size_bytes / packed.num_numbers
    print(
        f"{shown(packed.path)}: {size_text(packed.size_bytes)}, {bits:.2f} bits per number; "
        f"model.safetensors has {size_text(packed.weights_bytes)}"
    )
    print(f'Load it: pbkd.load("{shown(packed.path)}")')


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="Of `pbkd pack`.")],
    folder: Annotated[Path, typer.Argument(help="New folder for model.json and its weights.")],
) -> None:
    """Write a .pbkd file as a folder again, bit for bit.

    Example: `pbkd unpack half.pbkd half`
    """
    from pbkd.packing import unpack_file

    unpack_file(file, folder)
    print(f'Unpacked to {shown(folder)}; load it: pbkd.load("{shown(folder)}")')
