"""How many steps each part of the demo model is trained for."""

# What each part was trained with; the learning rate falls to zero over the last 60 % of the steps.
RECIPES = {
    "judge": {"steps": 900, "batch": 128, "lr": 2e-3},
    "text": {"steps": 1000, "batch": 128, "lr": 2e-3},
    "unet": {"steps": 2600, "batch": 32, "lr": 2e-3},
    "unet_small": {"steps": 5200, "batch": 32, "lr": 3e-3},
    "dit": {"steps": 5000, "batch": 32, "lr": 2e-3},
}
