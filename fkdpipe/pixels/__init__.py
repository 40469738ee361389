"""From an encoded image and a recorded crop to uint8 pixels; both phases replay crops with this."""
