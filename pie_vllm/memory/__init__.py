"""Who owns bytes: the device arena and facts about host memory."""
