# Stubs for what linattn uses of iree-base-compiler 3.13, whose wheel has none for its native modules.
