"""How kernels are written: builder, kernel text, SIMT kernels, dispatches, scalars."""
