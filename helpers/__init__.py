"""The steps of 2:4 structured sparsity, one module for each.

Read them in the order of the notebooks: `settings`, `data`, `models` (01),
`sparsity` (02), `training` (03), `onnx_export` (04), `engine` (05), `runners`,
`sparse_torch`, `benchmark` and `energy` (06), `gemm` and `advice` (07). `artifacts`
holds what the steps leave behind, `machine` and `checks` say what this computer can
do, `plots` draws.
"""

__version__ = "0.1.0"
PROJECT = "sparsity-2to4"
