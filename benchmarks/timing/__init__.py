"""The measuring core, and the machine that it runs on."""
