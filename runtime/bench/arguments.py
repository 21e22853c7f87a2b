"""What `linattn-bench` takes on its command line."""

from __future__ import annotations

import argparse

from linattn.runtime.command import version_line
from linattn.runtime.completion import add_completion

from .cases import RULES
from .op_models import DOMAINS, MICROSOFT
from .options import DEFAULT, MODEL_PEERS, OP_PEERS

OPS = {"linear_attention": "LinearAttention", "causal_conv": "CausalConvWithState"}
_EPILOG = """Examples:
  linattn-bench op --op linear_attention --heads 16 --dim 128 --tokens 1,64,1024 --peers onnxruntime --plot out.png
  linattn-bench op --op causal_conv --channels 6144 --taps 4 --tokens 1,512 --json out.json
  linattn-bench model model.onnx --prefill 512 --decode 128 --targets cpu --peers onnxruntime
  linattn-bench model model.onnx --prefill 512 --profile --json profile.json
  linattn-bench states model.vmfb --prompt 200 --forks 50
  linattn-bench plot laptop.json server.json -o tokens.png
  linattn-bench report laptop.json server.json -o report.html"""


def make_parser() -> argparse.ArgumentParser:
    """The command's parser, and those of its parts."""
    parser = argparse.ArgumentParser(
        prog="linattn-bench",
        description="Measures operators and models compiled by linattn beside their peers, the error beside each time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    packages = "iree-base-compiler", "iree-base-runtime", "onnxruntime"
    parser.add_argument("--version", action="version", version=version_line(*packages))
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="op|model|states|plot|report")
    _op_options(commands.add_parser("op", help="one operator over token counts"))
    _model_options(commands.add_parser("model", help="prefill and decode of whole models"))
    states = commands.add_parser("states", help="snapshots, forks, files and guards of a module, and many sessions")
    add = states.add_argument
    add("module", metavar="MODEL.vmfb", help="a module or a bundle of a model of token ids, of one row")
    add("--device", metavar="URI", help="where to run (default: where it was compiled for)")
    add("--prompt", type=int, default=200, metavar="N", help="tokens that are read first (default: 200)")
    add("--forks", type=int, default=50, metavar="N", help="sessions that go on from there (default: 50)")
    add("--steps", type=int, default=16, metavar="N", help="tokens that each appends (default: 16)")
    add("--json", action="store_true", help="print the rows for machines")
    add("--debug", action="store_true", help="show a traceback with an error")
    plot = commands.add_parser(
        "plot", help="a picture of results written with --json, models of several machines in one"
    )
    plot.add_argument("results", nargs="+", metavar="RESULT.json", help="one of op, or some of model")
    plot.add_argument("-o", "--output", required=True, metavar="FILE.png", help="file to write; needs matplotlib")
    plot.add_argument("--debug", action="store_true", help="show a traceback with an error")
    report = commands.add_parser("report", help="a page of results written with --json, of several machines and kinds")
    report.add_argument("results", nargs="+", metavar="RESULT.json", help="of op and model")
    report.add_argument(
        "-o", "--output", required=True, metavar="FILE.html", help="file to write, with nothing outside it"
    )
    report.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return parser


def _common_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--targets", default="cpu", metavar="cpu,cuda,vulkan", help="where to run; cuda:sm_89 names what to compile for"
    )
    add("--threads", type=int, metavar="N", help="CPU threads of every subject (default: each one's own default)")
    add("--seed", type=int, default=0, metavar="N", help="of the inputs (default: 0)")
    add("--json", metavar="FILE", help="write the result for machines; - to standard output")
    add("--markdown", metavar="FILE.md", help="write the table for a page; - to standard output")
    add("--csv", metavar="FILE.csv", help="write every number for a spreadsheet; - to standard output")
    add("--plot", metavar="FILE.png", help="draw the result; needs matplotlib")
    add("--no-ceilings", action="store_true", help="do not measure the machine's copy bandwidth and FMA rate")
    add("--quiet", action="store_true", help="show the table only, no progress")
    add("--debug", action="store_true", help="show a traceback with an error")


def _op_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", default="linear_attention", metavar="|".join(OPS), help="the operator")
    add("--rule", default="gated_delta", metavar="|".join(RULES), help="update rule (default: gated_delta)")
    add("--batch", type=int, default=1, metavar="B", help="sequences (default: 1)")
    add("--heads", type=int, default=16, metavar="N", help="query heads (default: 16)")
    add("--kv-heads", type=int, metavar="N", help="heads of key, value and state (default: as --heads)")
    add("--dim", type=int, default=128, metavar="N", help="size of a key head (default: 128)")
    add("--value-dim", type=int, metavar="N", help="size of a value head (default: as --dim)")
    add("--key-decay", action="store_true", help="a decay per key dimension instead of per head")
    add("--channels", type=int, default=6144, metavar="N", help="causal_conv: channels (default: 6144)")
    add("--taps", type=int, default=4, metavar="N", help="causal_conv: taps of the kernel (default: 4)")
    add("--tokens", default="1,64,1024", metavar="T,T,...", help="tokens of a call (default: 1,64,1024)")
    add("--dtype", default="f32", metavar="f32,f16,bf16", help="of the activations (default: f32)")
    add("--state-dtype", metavar="f32|f16|bf16", help="of the state (default: as --dtype)")
    add("--domain", default=MICROSOFT, metavar="|".join(DOMAINS), help=f"of linattn's operator (default: {MICROSOFT})")
    add(
        "--strategies",
        default=DEFAULT,
        metavar="NAME,...",
        help="strategies to force; default: linattn's choice; or all",
    )
    add("--peers", default="onnxruntime", metavar=",".join(OP_PEERS), help="peers, or none (default: onnxruntime)")
    add("--rounds", type=int, default=5, metavar="N", help="turns of each subject in a case (default: 5)")
    add("--seconds", type=float, default=1.0, metavar="S", help="timed seconds of a subject in a case (default: 1)")
    add("--warmup", type=int, default=3, metavar="N", help="untimed calls before the first turn (default: 3)")
    add(
        "--chain",
        type=int,
        default=8,
        metavar="N",
        help="nodes in the chain that tells kernel times on CUDA without torch, 0: none",
    )
    _common_options(parser)


def _model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL.onnx|MODEL.vmfb|MODEL.linattn",
        help="models to compile, and compiled ones (a .vmfb is code), of a bundle each module",
    )
    add("--prefill", default="512", metavar="N,N,...", help="tokens of the prompts (default: 512)")
    add("--decode", type=int, default=128, metavar="N", help="tokens to generate (default: 128)")
    add("--repeats", type=int, default=3, metavar="N", help="turns of each subject (default: 3)")
    add("--warmup", type=int, default=1, metavar="N", help="untimed prompts before the first turn (default: 1)")
    add("--strategies", default=DEFAULT, metavar="NAME,...", help="strategies to force; default: linattn's choice")
    add("--peers", default="onnxruntime", metavar=",".join(MODEL_PEERS), help="peers, or none (default: onnxruntime)")
    add("--all-logits", action="store_true", help="of a prompt the logits of all positions, not of the last one only")
    add(
        "--profile",
        action="store_true",
        help="show what each dispatch takes (decode at position --prefill) instead of timing whole calls",
    )
    _common_options(parser)
