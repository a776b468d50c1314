"""Where toys are photographed: eight calm places."""

# Scene name -> the phrase that a caption uses for it. The order is the number that `backdrops.backdrop` switches on.
SCENES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "grass": "in the grass",
    "desert": "in the desert",
    "night": "at night",
    "city": "in the city",
    "room": "in a room",
    "moon": "on the moon",
}
