"""Mismatched decoding: what the decoder of a bridged model can use of what its encoder gives it.

| file | what |
|---|---|
| `features` | one vector an item at every layer, in a run folder |
| `splits` | training and test parts by label and group |
| `probes` | which attributes are linearly there, and how well |
| `directions` | where the modality varies and texts do not |
| `ablate` | what the decoder loses without them |
| `gmi` | what the decoder's own scores make of an attribute, against what is there |
| `bound` | the paper's bound, in one space, against what was measured |
| `lora` | what changes when the decoder learns an attribute |
| `finding` | table, sentence and interval; finished steps |
| `results` | tables and sentences of a folder, attribute by attribute |
"""
