"""Draws the picture of the idea, once for light pages and once for dark ones: python docs/make/idea.py"""

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
PALETTES = {
    "light": dict(ink="#1f2328", soft="#59636e", box="#e8eaf6", edge="#5c6bc0", hot="#d84315", faint="#b6bcc4"),
    "dark": dict(ink="#e6edf3", soft="#a0a8b4", box="#2a3052", edge="#8c9eff", hot="#ff8a65", faint="#5a6270"),
}
A, B, WIDTH = 20, 340, 200
TOKENS = [20, 52, 84, 116, 148, 180]
"""Where the states of a prompt's tokens stand within a column."""


def text(x: float, y: float, words: str, colour: str, **more: object) -> str:
    how = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="middle" {how}>{words}</text>'


def box(x: float, y: float, height: float, fill: str, edge: str, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{height}" rx="8" fill="{fill}" stroke="{edge}" stroke-width="1.5"{dash}/>'


def states(x: float, y: float, c: dict[str, str]) -> list[str]:
    """A row of states, one for each token; the last one is what is handed over, or replaced."""
    plain = [
        f'<circle cx="{x + t}" cy="{y}" r="8" fill="{c["box"]}" stroke="{c["edge"]}" stroke-width="1.5"/>'
        for t in TOKENS[:-1]
    ]
    return [*plain, f'<circle cx="{x + TOKENS[-1]}" cy="{y}" r="9" fill="{c["hot"]}"/>']


def arrow(path: str, colour: str, width: float = 1.5) -> str:
    head = "hot" if width > 2 else "head"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" marker-end="url(#{head})"/>'


def draw(c: dict[str, str]) -> str:
    marker = '<marker id="{}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="{}" markerHeight="{}" orient="auto"><path d="M0 0 8 4 0 8z" fill="{}"/></marker>'
    middle_a, middle_b = A + WIDTH / 2, B + WIDTH / 2
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 560 424" width="560" height="424" role="img" font-family="system-ui, sans-serif" font-size="15">',
        "<title>Model A is paused after layer k. The state of its last token is put into model B after layer j, and B continues.</title>",
        "<defs>" + marker.format("head", 7, 7, c["soft"]) + marker.format("hot", 4.5, 4.5, c["hot"]) + "</defs>",
        text(middle_a, 22, "Model A", c["ink"], font_weight=600, font_size=17),
        text(middle_b, 22, "Model B", c["ink"], font_weight=600, font_size=17),
        # A
        box(A, 90, 62, "none", c["faint"], dashed=True),
        text(middle_a, 117, "layers k+1 to L", c["soft"]),
        text(middle_a, 137, "not run", c["soft"], font_size=13),
        *states(A, 206, c),
        arrow(f"M{middle_a} 270V226", c["soft"]),
        box(A, 272, 62, c["box"], c["edge"]),
        text(middle_a, 308, "layers 1 to k", c["ink"]),
        arrow(f"M{middle_a} 374V338", c["soft"]),
        text(middle_a, 394, "“Alice is at the", c["ink"], font_style="italic"),
        text(middle_a, 414, "Acropolis of Athens.”", c["ink"], font_style="italic"),
        # B
        text(middle_b, 58, "“Greece”", c["ink"], font_style="italic", font_weight=600),
        arrow(f"M{middle_b} 88V66", c["soft"]),
        box(B, 90, 62, c["box"], c["edge"]),
        text(middle_b, 126, "layers j+1 to L", c["ink"]),
        arrow(f"M{middle_b} 188V156", c["soft"]),
        *states(B, 206, c),
        arrow(f"M{middle_b} 270V226", c["soft"]),
        box(B, 272, 62, c["box"], c["edge"]),
        text(middle_b, 308, "layers 1 to j", c["ink"]),
        arrow(f"M{middle_b} 374V338", c["soft"]),
        text(middle_b, 394, "“Which country is", c["ink"], font_style="italic"),
        text(middle_b, 414, "Alice located in?”", c["ink"], font_style="italic"),
        # The message
        arrow(f"M{A + TOKENS[-1] + 12} 206C{A + 262} 206 {B - 36} 250 {B + 40} 250 S{B + TOKENS[-1]} 250 {B + TOKENS[-1]} 221", c["hot"], 2.6),
        text(280, 176, "one state,", c["hot"], font_weight=600),
        text(280, 195, "of the last token", c["hot"], font_weight=600),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    for name, colours in PALETTES.items():
        (ASSETS / f"idea-{name}.svg").write_text(draw(colours), encoding="utf-8")
