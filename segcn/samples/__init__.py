"""The sample sets (landscapes, Earth, echocardiograms) and the recipe of the small base model."""
