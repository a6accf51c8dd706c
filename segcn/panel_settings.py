"""The panel's sampling settings as fields."""

import dataclasses
import secrets

import ipywidgets as w

from segcn.config import SampleConfig
from segcn.errors import UserError
from segcn.sampling import SCHEDULERS

WIDTH = "400px"
STYLE = {"description_width": "104px"}
SEEDS = 2**31  # new seeds are drawn below it


class PanelSettings(w.VBox):
    """Prompt, settings, number of images and seed; what it does not show stays as in `defaults`."""

    def __init__(self, defaults: SampleConfig):
        self.defaults = defaults
        plain = {"layout": w.Layout(width=WIDTH), "style": STYLE}
        line = plain | {"continuous_update": False}  # sent when left, so before the button that is pressed next
        half = line | {"layout": w.Layout(width="196px")}  # fields: a slider forgets a number typed without Enter
        share = line | {"min": 0, "max": 1, "step": 0.05, "readout_format": ".0%"}
        self.prompt = w.Textarea(description="prompt", rows=3, **line)
        self.negative_prompt = w.Text(description="not wanted", placeholder="negative prompt", **line)
        self.steps = w.BoundedIntText(min=1, max=1000, description="steps", **half)
        self.guidance = w.BoundedFloatText(min=1, max=100, step=0.5, description="guidance", **half)
        self.strength = w.BoundedFloatText(min=0, max=100, step=0.1, description="mask weight", **half)
        self.number = w.BoundedIntText(1, min=1, max=16, description="images", **half)
        self.guidance_window = w.FloatRangeSlider(description="text acts", **share)
        self.window = w.FloatRangeSlider(description="mask acts", **share)
        self.scheduler = w.Dropdown(options=list(SCHEDULERS), description="scheduler", **plain)
        self.seed = w.BoundedIntText(max=2 * SEEDS, description="seed", layout=w.Layout(width="246px"), style=STYLE)
        self.lock = w.ToggleButton(layout=w.Layout(width="150px"), tooltip="a new seed a press, or this one")
        self.lock.observe(lambda _: self._name_lock(), "value")
        self._name_lock()
        self.show(defaults)
        pairs = (self.steps, self.number), (self.guidance, self.strength)
        texts, rows = [self.prompt, self.negative_prompt], [w.HBox(pair) for pair in pairs]
        windows, seed = [self.guidance_window, self.window], w.HBox([self.seed, self.lock])
        super().__init__([*texts, *rows, *windows, self.scheduler, seed])

    def settings(self) -> SampleConfig:
        """The settings as the controls stand; UserError where the mask would act in no step."""
        start, end = self.window.value
        if start == end:
            raise UserError(f"mask acts: expected some of the steps, found {start:.0%} to {end:.0%}; widen it")
        return dataclasses.replace(
            self.defaults,
            num_inference_steps=self.steps.value,
            guidance_scale=self.guidance.value,
            guidance_start=self.guidance_window.value[0],
            guidance_end=self.guidance_window.value[1],
            controlnet_conditioning_scale=self.strength.value,
            control_guidance_start=start,
            control_guidance_end=end,
            negative_prompt=self.negative_prompt.value,
            scheduler=self.scheduler.value,
            seed=self.seed.value,
        )

    def show(self, settings: SampleConfig) -> None:
        """Put other settings into the controls."""
        self.steps.value = settings.num_inference_steps
        self.guidance.value = settings.guidance_scale
        self.guidance_window.value = settings.guidance_start, settings.guidance_end
        self.strength.value = settings.controlnet_conditioning_scale
        self.window.value = settings.control_guidance_start, settings.control_guidance_end
        self.negative_prompt.value = settings.negative_prompt
        self.scheduler.value = settings.scheduler
        self.seed.value = settings.seed

    def renew_seed(self) -> None:
        """A new seed, unless it is locked."""
        if not self.lock.value:
            self.seed.value = secrets.randbelow(SEEDS)

    def _name_lock(self) -> None:
        self.lock.description = "locked" if self.lock.value else "new each time"
        self.lock.icon = "lock" if self.lock.value else "unlock"
