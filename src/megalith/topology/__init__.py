"""Who and where a process is: sizes of the parallel axes, the device, its hardware, its seeds. Knows no model."""
