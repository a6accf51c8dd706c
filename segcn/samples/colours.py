"""What times of day and seasons look like: the colours of the light and of nature."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Light:
    """Colours of a time of day, RGB 0..255; tint multiplies every material's colour."""

    sky: tuple  # top, middle, bottom
    tint: tuple
    haze: tuple
    mist: float  # opacity of the haze at the horizon
    disc: tuple
    glow: tuple
    cloud: tuple  # top, base
    water: tuple
    ice: tuple
    window: tuple


LIGHTS = {
    "dawn": Light(
        sky=((120, 178, 226), (240, 200, 214), (255, 222, 190)),
        tint=(0.92, 0.82, 0.92),
        haze=(250, 212, 212),
        mist=0.42,
        disc=(255, 236, 140),
        glow=(255, 232, 180),
        cloud=((255, 251, 250), (198, 160, 198)),
        water=(110, 150, 200),
        ice=(146, 186, 226),
        window=(120, 130, 156),
    ),
    "day": Light(
        sky=((38, 108, 210), (96, 166, 236), (168, 214, 246)),
        tint=(1.0, 1.0, 1.0),
        haze=(190, 216, 238),
        mist=0.16,
        disc=(255, 232, 92),
        glow=(255, 250, 214),
        cloud=((255, 255, 255), (196, 208, 224)),
        water=(36, 104, 178),
        ice=(130, 184, 222),
        window=(96, 130, 160),
    ),
    "dusk": Light(
        sky=((58, 28, 100), (186, 52, 84), (255, 146, 44)),
        tint=(0.60, 0.43, 0.52),
        haze=(186, 78, 92),
        mist=0.2,
        disc=(255, 214, 84),
        glow=(255, 160, 60),
        cloud=((255, 190, 176), (160, 92, 140)),
        water=(72, 42, 104),
        ice=(92, 72, 138),
        window=(255, 206, 100),
    ),
    "night": Light(
        sky=((6, 10, 36), (20, 32, 76), (40, 56, 108)),
        tint=(0.36, 0.43, 0.58),
        haze=(52, 70, 120),
        mist=0.14,
        disc=(246, 246, 224),
        glow=(120, 140, 200),
        cloud=((136, 144, 176), (82, 92, 132)),
        water=(16, 36, 92),
        ice=(40, 68, 126),
        window=(255, 214, 110),
    ),
}


@dataclass(frozen=True)
class Nature:
    """Colours of a season, RGB 0..255 in daylight."""

    grass: tuple
    dots: tuple  # colours of flowers or fallen leaves
    rock: tuple
    snow: float  # how far snow reaches down the mountains, share of their height
    foliage: tuple  # lit, shaded
    pine: tuple  # lit, shaded


NATURES = {
    "spring": Nature(
        grass=(142, 216, 78),
        dots=((255, 150, 190), (255, 255, 255), (255, 232, 80)),
        rock=(136, 128, 132),
        snow=0.34,
        foliage=((255, 196, 220), (222, 112, 164)),
        pine=((70, 150, 84), (34, 96, 62)),
    ),
    "summer": Nature(
        grass=(70, 148, 52),
        dots=(),
        rock=(124, 112, 92),
        snow=0.0,
        foliage=((64, 140, 48), (18, 70, 34)),
        pine=((44, 112, 62), (14, 62, 42)),
    ),
    "autumn": Nature(
        grass=(206, 152, 62),
        dots=((220, 84, 34), (170, 60, 30)),
        rock=(138, 108, 94),
        snow=0.16,
        foliage=((246, 136, 36), (182, 46, 26)),
        pine=((66, 106, 58), (30, 64, 42)),
    ),
    "winter": Nature(
        grass=(228, 236, 248),
        dots=(),
        rock=(112, 118, 136),
        snow=0.62,
        foliage=((228, 238, 248), (128, 152, 184)),
        pine=((84, 128, 120), (36, 76, 78)),
    ),
}
WALLS = {"red": (204, 48, 42), "blue": (56, 108, 200), "yellow": (244, 196, 56), "white": (250, 244, 228)}
SNOW = (246, 249, 255)
