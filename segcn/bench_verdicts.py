"""What a benchmark of painting says: a line a side, what the numbers are of, and whether each promise is met."""

from collections.abc import Iterator

from segcn.bench_train import BUSY

FASTER, LESS_FAITHFUL, MORE_MEMORY = 4.0, 0.02, 1.05  # what segcn promises against the plain way


def table(found: dict) -> list[str]:
    """A line a side."""
    width = max(map(len, found["sides"]))
    lines = [f"{'':{width}}  images/s  img/CPU s   mIoU   kernel distance     colour shift (L, a, b)   peak GiB"]
    for title, one in found["sides"].items():
        shift, peak = one["colour_shift"], one.get("peak_gib")
        most = f"{max(peak.values()):.2f}" if peak else "-"
        lines.append(
            f"{title:{width}} {one['images_per_second']:9.3f} {one['images_per_cpu_second']:10.3f} {one['miou']:6.3f} "
            f"{one['kernel_distance']:9.2e} +-{one['kernel_distance_interval']:8.1e} {shift['delta_e']:6.2f} "
            f"({shift['L']:+5.2f}, {shift['a']:+5.2f}, {shift['b']:+5.2f}) {most:>9}"
        )
    return lines


def remarks(found: dict) -> Iterator[str]:
    """What the numbers are of."""
    yield (
        f"{found['images']} images a side, the same masks, captions and noise, in memory before and after; the same "
        "weights in the same memory layout."
    )
    yield f"The judge finds mIoU {found['ceiling']:.3f} in the real images."
    yield f"Kernel distance between features of real and painted images, +- its 95 % interval: {found['extractor']}."
    yield f"Colour: mean CIELAB of the images less that of the real ones. {found['machine']}."
    seen = found["undisturbed"]
    if seen["other_load"] > BUSY:
        yield f"Other programs kept up to {seen['other_load']:.1f} cores busy during a turn: its times mean little."
    if seen["together"] < seen["turns"]:
        yield f"{seen['turns'] - seen['together']} of {seen['turns']} turns were not painted in one run by all sides."


def verdicts(found: dict) -> Iterator[str]:
    """Each promise, with what was found and whether it is met, against the plain way's best in each respect."""
    for title, one in found["against"].items():
        low, high = one["times_faster_range"]
        yield f"{title}, against the best of the plain way in each respect:"
        yield verdict(
            f"{one['times_faster']:.2f} times the images a second (turns: {low:.2f} to {high:.2f})",
            f">= {FASTER:g}", one["times_faster"] >= FASTER,
        )  # fmt: skip
        yield verdict(
            f"mIoU {one['miou_less_best']:+.3f}", f">= -{LESS_FAITHFUL}", one["miou_less_best"] >= -LESS_FAITHFUL
        )
        excess, interval = one["kernel_distance_less_best"], one["kernel_distance_less_best_interval"]
        yield verdict(f"kernel distance {excess:+.2e}", f"<= {interval:.1e}, its interval", excess <= interval)
        peak = list(found["sides"][title].get("peak_gib", {}).items())
        if len(peak) == 2:
            grown = peak[1][1] / peak[0][1]
            yield verdict(
                f"peak memory from {peak[0][0]} to {peak[1][0]} masks: {grown:.2f} times", f"<= {MORE_MEMORY}",
                grown <= MORE_MEMORY,
            )  # fmt: skip


def verdict(found: str, wanted: str, met: bool) -> str:
    """A line that ends with met or MISSED."""
    return f"  {found}  {wanted}  {'met' if met else 'MISSED'}"
