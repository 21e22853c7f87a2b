"""Draws rooms.svg, the picture of the house in architecture.md: which folder gives what to which.

python docs/contributing/rooms.py > docs/contributing/rooms.svg
"""

from __future__ import annotations

BOX = '<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" class="{kind}"/>'
ROOMS = [
    # x, y, width, height, kind, title, lines
    (20, 20, 340, 300, "side", "frontend", []),
    (40, 60, 300, 44, "room", "graph", ["a file a pass: check, raise, pair states"]),
    (40, 112, 300, 44, "room", "plan", ["dims, entry points, choices, report"]),
    (40, 164, 300, 44, "room", "lower", ["IREE's importer and compiler, weights"]),
    (40, 216, 140, 44, "room", "targets", ["machines as data"]),
    (200, 216, 140, 44, "room", "process", ["a process of its own"]),
    (40, 274, 300, 32, "file", "compile.py", []),
    (400, 20, 340, 300, "side", "dialect_patterns", []),
    (420, 60, 300, 44, "room", "registry, select", ["which operator, which strategy, why"]),
    (
        420,
        112,
        300,
        96,
        "room",
        "an operator's folder",
        [
            "contract.py: what the node says, checked",
            "op.py: its strategies, best first",
            "reference.py: what is right, in numpy",
        ],
    ),
    (420, 216, 300, 44, "room", "a file a strategy", ["fused_simd.py, fused_simt.py, chunked.py"]),
    (420, 274, 300, 32, "file", "emit: how kernels are written", []),
    (20, 400, 720, 200, "side", "runtime", []),
    (40, 440, 160, 66, "room", "text", ["tokenizer, template,", "TextGenerator"]),
    (220, 440, 150, 66, "room", "Program, Session", ["states, snapshots;", "commit or nothing"]),
    (390, 440, 150, 66, "room", "engine", ["calls, one at a time;", "memory on the device"]),
    (560, 440, 160, 66, "room", "loading", ["files, seal, manifest,", "what the machine can do"]),
    (
        220,
        526,
        500,
        54,
        "room",
        "drivers.py, opening.py, device.py, module.py",
        ["the only files that touch iree.runtime"],
    ),
    (40, 526, 160, 54, "room", "bench", ["linattn-bench"]),
]
ARROWS = [
    ("M 360 134 L 412 134", "nodes", 366, 128),
    ("M 190 320 L 190 392", "model.vmfb", 200, 364),
    ("M 200 472 L 214 472", "", 0, 0),
    ("M 370 472 L 384 472", "", 0, 0),
    ("M 560 472 L 546 472", "", 0, 0),
    ("M 465 506 L 465 520", "", 0, 0),
    ("M 640 506 L 640 520", "", 0, 0),
]


def draw() -> str:
    """The picture as SVG; its colours follow the reader's scheme."""
    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 620" role="img" '
        'aria-label="frontend reads ONNX and writes a module with the help of dialect_patterns; runtime runs it">',
        "<style>text{font:13px sans-serif;fill:#1d2b30}.t{font-weight:600}.s{font-size:11px;fill:#3f5258}"
        ".side{fill:#eef3f4;stroke:#90a4ae}.room{fill:#fff;stroke:#90a4ae}.file{fill:#dcebe8;stroke:#6fa59b}"
        ".a{stroke:#37474f;stroke-width:1.6;fill:none;marker-end:url(#e)}</style>",
        '<defs><marker id="e" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0 0 L6 3 L0 6 z" fill="#37474f"/></marker></defs>',
        '<rect width="760" height="620" fill="#fff"/>',
    ]
    for x, y, w, h, kind, title, lines in ROOMS:
        out.append(BOX.format(x=x, y=y, w=w, h=h, kind=kind))
        out.append(f'<text x="{x + 12}" y="{y + 20}" class="t">{title}</text>')
        out += [f'<text x="{x + 12}" y="{y + 37 + 17 * i}" class="s">{line}</text>' for i, line in enumerate(lines)]
    for path, label, x, y in ARROWS:
        out.append(f'<path d="{path}" class="a"/>')
        if label:
            out.append(f'<text x="{x}" y="{y}" class="s">{label}</text>')
    out.append('<text x="290" y="364" class="s">imports nothing from above: numpy and iree-base-runtime only</text>')
    return "\n".join([*out, "</svg>"])


if __name__ == "__main__":
    print(draw())
