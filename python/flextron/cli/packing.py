"""The options --pack and --calibrate, and the model that a command loads by them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options, values

_CALIBRATED = 256  # tokens of a sequence


def pack(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--pack",
        choices=("same", "int8", "w8a8", "int4"),
        help="lay the weights out for a CPU first: with the values they have (same), as 8-bit integers (int8), with "
        "what the layers read as 8-bit integers, too (w8a8), or that with weights of 4 bits (int4)",
    )
    parser.add_argument(
        "--calibrate",
        type=values.count,
        metavar="N",
        help=f"sequences of {_CALIBRATED} tokens, of the part of --data that stages train on, by which --pack int4 "
        "rounds weights: minutes, for less loss",
    )


def read_text(args: Namespace) -> Any:
    """--data, --weights and --field as the stages take them, read already where --calibrate needs them, too."""
    text = options.text_of(args)
    if args.calibrate is None:
        return text
    if args.pack != "int4":
        got = f"--pack {args.pack}" if args.pack else "no --pack"
        raise ValueError(f"{args.command}: --calibrate must be given with --pack int4, got {got}")
    from flextron.checkpoint.hf import read_tokenizer
    from flextron.corpus import corpus

    return corpus(read_tokenizer(options.fetched(args)), text)


def loaded(args: Namespace, text: Any) -> tuple[str, Any]:
    """The directory of a checkpoint and its model, on its device and packed as --pack says; text: `read_text`'s."""
    from flextron.corpus import windows
    from flextron.inference import from_pretrained
    from flextron.nn.packed import pack
    from flextron.nn.placement import one_device

    # panels are a CPU's
    device = one_device(args.command, "cpu" if args.pack and args.device == "auto" else args.device)
    directory, calibration = options.fetched(args), None
    model = from_pretrained(directory, args.dtype, device=device)
    if args.calibrate is not None:
        length = min(_CALIBRATED, getattr(model.config, "max_position_embeddings", _CALIBRATED))
        calibration = windows(text.train, args.calibrate, length, "--calibrate")
    if args.pack:
        pack(model, None if args.pack == "same" else args.pack, calibration)
    return directory, model
