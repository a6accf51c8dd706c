"""What `segcn samples measure` found, as the text that stands on the model card."""

from collections.abc import Iterator

NAMES = {
    "real": "real (ceiling)",
    "reconstructions": "reconstructions",
    "with_mask": "with mask",
    "captions_alone": "captions alone",
}
LEAD = 20  # letters of a line's name


def report(metrics: dict) -> str:
    """Faithfulness and its share of the ceiling, what was recognised, the autoencoder, speed, and the targets."""
    blocks = [faithfulness_lines(metrics), share_lines(metrics), recognised_lines(metrics["recognised"])]
    if metrics["recognised_earth"]:
        blocks.append(recognised_lines(metrics["recognised_earth"], "recognised, Earth"))
    return "\n\n".join("\n".join(block) for block in [*blocks, other_lines(metrics), target_lines(metrics)])


def faithfulness_lines(metrics: dict) -> list[str]:
    """Intersection over union for each set and class."""
    found = metrics["faithfulness"]
    lines = [row("IoU", ["images", "mean", *found["real"]["per_class"]])]
    for name, one in found.items():
        values = [one["miou"], *one["per_class"].values()]
        lines.append(row(NAMES[name], [str(one["images"]), *("-" if v is None else f"{v:.3f}" for v in values)]))
    return lines


def share_lines(metrics: dict) -> list[str]:
    """The same as shares of what the segmenter finds in the real images."""
    shares = metrics["share_of_ceiling"]
    lines = [row("share of the ceiling", ["", *shares["real"]])]
    others = [name for name in shares if name != "real"]
    return lines + [row(NAMES[name], ["", *map(percent, shares[name].values())]) for name in others]


def recognised_lines(recognised: dict, title: str = "recognised") -> list[str]:
    """The share of images of which a classifier tells what their caption says."""
    lines = [row(title, list(recognised["real"]), 12)]
    return lines + [row(NAMES[name], list(map(percent, found.values())), 12) for name, found in recognised.items()]


def other_lines(metrics: dict) -> list[str]:
    """Autoencoder, distance and speed."""
    likeness, timing, apart = (metrics[name] for name in ("autoencoder", "seconds", "distance"))
    return [
        f"autoencoder: PSNR {likeness['psnr']:.1f} dB, SSIM {likeness['ssim']:.3f}",
        f"Fréchet distance of with mask to real: {apart['frechet_distance']:.4g} ({apart['extractor']})",
        f"{timing['steps']} steps with guidance and mask: {timing['one']:.2f} s for one image, "
        f"{timing['each_of_many']:.2f} s for each of {timing['at_once']} in one call",
        f"(CPU time {timing['cpu_one']:.2f} s and {timing['cpu_each_of_many']:.2f} s; {timing['machine']}; "
        f"load before it {timing['load']:.1f}; median of {timing['timings']} after a warm-up)",
    ]


def target_lines(metrics: dict) -> list[str]:
    """Each figure that has a target, and whether it is met."""
    lines = [f"{'target':48}{'found':>9}{'wanted':>10}"]
    for what, found, wanted, unit in targets(metrics):
        is_met = found <= wanted if unit == "s" else found >= wanted
        shown = (f"{found:.2f} s", f"<= {wanted:.1f} s") if unit == "s" else (percent(found), f">= {wanted:.0%}")
        lines.append(f"{what:48}{shown[0]:>9}{shown[1]:>10}  {'met' if is_met else 'MISSED'}")
    return lines


def targets(metrics: dict) -> Iterator[tuple[str, float, float, str]]:
    """(what, found, wanted, unit): shares are wanted at least, seconds at most."""
    for name, mean, least in (("reconstructions", 0.9, 0.6), ("with_mask", 0.75, 0.45)):
        shares = metrics["share_of_ceiling"][name]
        per_class = {label: share for label, share in shares.items() if label != "mean" and share is not None}
        worst = min(per_class, key=lambda label: per_class[label])
        yield f"{NAMES[name]}: mIoU, of the ceiling", shares["mean"], mean, ""
        yield f"{NAMES[name]}: worst class ({worst}), of its own", per_class[worst], least, ""
    for name, wanted in (("real", 0.98), ("captions_alone", 0.9), ("with_mask", 0.85)):
        for head, found in metrics["recognised"][name].items():
            yield f"{NAMES[name]}: {head} recognised", found, wanted, ""
    if metrics["recognised_earth"]:
        yield (
            "Earth, captions alone: style recognised",
            metrics["recognised_earth"]["captions_alone"]["style"],
            0.95,
            "",
        )
    yield "one image", metrics["seconds"]["one"], 2.0, "s"
    yield f"each of {metrics['seconds']['at_once']} images in one call", metrics["seconds"]["each_of_many"], 0.7, "s"


def row(name: str, cells: list[str], width: int = 8) -> str:
    """One line of a table."""
    return (f"{name:{LEAD}}" + "".join(f"{cell:>{width}} " for cell in cells)).rstrip()


def percent(share: float | None) -> str:
    """ "93.1%"."""
    return "-" if share is None else f"{share:.1%}"
