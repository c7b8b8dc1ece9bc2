"""Everything that runs inside a TorchServe worker; packed whole into every archive.

A request's way, and the modules it passes:

=================  ============================================================================
cycles             `diffusers_handler` (TorchServe's contexts), `torchserve_entry`, `silence`
requests in        `wire` → `rows`, `kserve`, `accept`, `request` → `fields`
from row to reply  `service` → `prompts`, `stream`, `preview`, `metrics`
in flight          `engine` → `intake` → `view`, `schedulers`, `pace`; `policy`, `ticket`
one request        `runs` → `parking`, `view`, `adapters`, `exclusive`
one forward        `forward` → `merging`, `fingerprints`, `proof`; `prepared`
replies out        `results`, `replies` → `encoding`, `metadata`, `outcome`
made fast          `speed` → `channels_last`, `prepared`
opening            `loading` → `archive`, `components` → `variants`, `safetensors_map`
zips               `zipread` → `zip_directory`, `crc32`
everywhere         `config`, `errors`
=================  ============================================================================

Only `diffusers_handler` and `metrics` know TorchServe; `policy`, `request`, `wire`, `config` and
`replies` import neither torch nor diffusers.
"""
