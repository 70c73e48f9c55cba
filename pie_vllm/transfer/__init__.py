"""Who moves bytes: the binding of the native transfer engine."""
