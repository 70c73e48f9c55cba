"""Policy: decides where blocks live. Pure Python; owns no bytes and no clock."""
