"""Research on top of the library: the study of the paper's claims, the scaling model and the benchmarks."""
