"""Draw the pictures of README and of the documentation, as SVG, with nothing but Python.

    python docs/pictures/draw.py

`overview.svg` says what the package does. `relation.svg` shows the loss on eight rows of a circle: its distributions
and its divergence are computed here by the formulas, at the temperatures of the defaults.
"""

import math
from pathlib import Path

FOLDER = Path(__file__).parent
PAPER, INK, GREY, LINE = "#fcfcfb", "#1f2328", "#57606a", "#c9cfd6"
TEACHER, STUDENT, BANK = "#1f6feb", "#d1570c", "#6e7781"
FONT = "font-family='Helvetica, Arial, DejaVu Sans, sans-serif'"
HEAD = (
    "<marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
    f"<path d='M0 0 L8 4 L0 8 z' fill='{GREY}'/></marker>"
)


def page(width: int, height: int, title: str, parts: list[str]) -> str:
    """A picture on paper of its own, so that it can be read on a light and on a dark page."""
    frame = f"<rect width='{width}' height='{height}' rx='10' fill='{PAPER}' stroke='{LINE}'/>"
    start = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' {FONT}>"
    return "\n".join([start, f"<title>{title}</title>", f"<defs>{HEAD}</defs>", frame, *parts, "</svg>"]) + "\n"


def text(
    x: float, y: float, words: str, size: int = 14, color: str = INK, anchor: str = "middle", more: str = ""
) -> str:
    """Words at a place."""
    return f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{color}' text-anchor='{anchor}' {more}>{words}</text>"


def box(x: float, y: float, width: float, height: float, color: str, words: list[str]) -> str:
    """A box with lines of words, the first one bold."""
    lines = []
    for number, line in enumerate(words):
        place = y + height / 2 + 5 + 18 * (number - (len(words) - 1) / 2)
        bold = "font-weight='bold'" if number == 0 else ""
        lines.append(text(x + width / 2, place, line, 13 if number else 15, color, more=bold))
    shape = f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='8' fill='{color}14' stroke='{color}'/>"
    return "\n".join([shape, *lines])


def arrow(*points: tuple[float, float], color: str = GREY, more: str = "") -> str:
    """A line through some points, with a tip at its end."""
    places = " ".join(f"{x:g},{y:g}" for x, y in points)
    return (
        f"<polyline points='{places}' fill='none' stroke='{color}' stroke-width='1.6' marker-end='url(#tip)' {more}/>"
    )


def bars(x: float, y: float, values: list[float], color: str, width: float = 14, height: float = 60) -> str:
    """Bars of a distribution above a line; the tallest that there can be is `height`."""
    drawn = [
        f"<rect x='{x + number * (width + 4):g}' y='{y - height * value:.2f}' width='{width:g}' "
        f"height='{height * value:.2f}' fill='{color}'/>"
        for number, value in enumerate(values)
    ]
    length = len(values) * (width + 4)
    base = f"<line x1='{x - 3:g}' y1='{y:g}' x2='{x + length - 1:g}' y2='{y:g}' stroke='{GREY}'/>"
    return "\n".join([*drawn, base])


def softmax(logits: list[float]) -> list[float]:
    """Of a few numbers."""
    powers = [math.exp(each - max(logits)) for each in logits]
    return [each / sum(powers) for each in powers]


def divergence(teacher: list[float], student: list[float]) -> float:
    """KL of two distributions."""
    return sum(t * math.log(t / s) for t, s in zip(teacher, student, strict=True))


def overview() -> str:
    """What the package does."""
    teacher_bars, student_bars = [0.55, 1.0, 0.3, 0.06, 0.1, 0.4], [0.4, 0.85, 0.45, 0.2, 0.15, 0.3]
    parts = [
        box(20, 110, 116, 70, GREY, ["examples", "texts, images,", "labels or none"]),
        box(190, 36, 150, 84, TEACHER, ["teacher", "big, frozen,", "read once if cached"]),
        box(190, 176, 150, 66, STUDENT, ["student", "small, trained"]),
        arrow((136, 130), (160, 130), (160, 78), (188, 78)),
        arrow((136, 160), (160, 160), (160, 209), (188, 209)),
        box(392, 110, 126, 70, BANK, ["bank", "4,096 teacher", "embeddings"]),
        arrow((340, 78), (455, 78), (455, 108)),
        arrow((340, 66), (572, 66)),
        arrow((340, 222), (572, 222)),
        arrow((518, 135), (545, 135), (545, 84), (572, 84), color=BANK),
        arrow((518, 155), (545, 155), (545, 204), (572, 204), color=BANK),
        text(634, 30, "what the teacher finds alike", 13, TEACHER),
        bars(580, 98, teacher_bars, TEACHER),
        bars(580, 236, student_bars, STUDENT),
        text(634, 258, "what the student finds alike", 13, STUDENT),
        arrow((634, 112), (634, 166), more="stroke-dasharray='5 4'"),
        text(644, 143, "learns", 13, GREY, "start", "font-style='italic'"),
        box(742, 176, 158, 66, STUDENT, ["a plain model", "transformers,", "no hf_rrd needed"]),
        arrow((704, 209), (740, 209)),
        text(821, 60, "It also learns, as ever,", 13, GREY),
        text(821, 79, "the labels and", 13, GREY),
        text(821, 98, "the teacher’s answers", 13, GREY),
        arrow((821, 108), (821, 172), more="stroke-dasharray='5 4'"),
    ]
    return page(920, 276, "What hf_rrd does", parts)


def relation() -> str:
    """The two distributions of one example, computed."""
    bank = [15.0, 42, 65, 100, 150, 215, 270, 320]  # degrees on the circle
    sides = {"teacher": (55.0, 0.02, TEACHER), "student": (88.0, 0.1, STUDENT)}
    center, radius = (150.0, 158.0), 104.0

    def place(angle: float, length: float = radius) -> tuple[float, float]:
        turned = math.radians(angle)
        return center[0] + length * math.cos(turned), center[1] - length * math.sin(turned)

    parts = [f"<circle cx='{center[0]}' cy='{center[1]}' r='{radius}' fill='none' stroke='{LINE}'/>"]
    for number, angle in enumerate(bank, 1):
        (x, y), (tx, ty) = place(angle), place(angle, radius + 18)
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='6' fill='{BANK}'/>")
        parts.append(text(round(tx, 1), round(ty + 5, 1), str(number), 13, GREY))
    found: dict[str, list[float]] = {}
    for row, (name, (angle, temperature, color)) in enumerate(sides.items()):
        x, y = place(angle, radius - 4)
        (tx, ty) = place(angle, radius * 0.56)
        parts.append(
            f"<line x1='{center[0]}' y1='{center[1]}' x2='{x:.1f}' y2='{y:.1f}' stroke='{color}' stroke-width='3'/>"
        )
        away = 34 if row == 0 else -34
        parts.append(text(round(tx + away, 1), round(ty + 8, 1), name, 14, color, more="font-weight='bold'"))
        found[name] = softmax([math.cos(math.radians(angle - each)) / temperature for each in bank])
        base = 118 + 130 * row
        parts.append(text(330, base - 78, f"{name}, temperature {temperature:g}", 14, color, "start"))
        parts.append(bars(330, base, found[name], color, width=30, height=66))
        for number, value in enumerate(found[name]):
            middle = 345 + 34 * number
            parts.append(text(middle, base + 16, str(number + 1), 12, GREY))
            if value >= 0.005:
                parts.append(text(middle, round(base - 66 * value - 4, 1), f"{value:.2f}", 12, INK))
    left = divergence(found["teacher"], found["student"])
    parts += [
        text(640, 120, "relational_kl", 14, GREY, "start"),
        text(640, 150, f"{left:.2f}", 28, INK, "start"),
        text(640, 176, "0 when the two", 13, GREY, "start"),
        text(640, 194, "distributions agree", 13, GREY, "start"),
        text(150, 300, "the bank’s rows, and one example", 13, GREY),
    ]
    return page(800, 316, "One example’s relations to a bank of eight rows", parts)


PICTURES = {"overview.svg": overview, "relation.svg": relation}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
