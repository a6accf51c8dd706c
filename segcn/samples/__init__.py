"""The embedded defaults: procedural landscapes and the recipe of the small base model."""
