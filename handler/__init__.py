"""Everything that runs inside a TorchServe worker; packed whole into every archive.

====================  =====================================================================
`diffusers_handler`   TorchServe's contexts and cycles
`cycle_replies`       what a cycle replies: whole replies, chunks of streams, nothing yet
`cycle_messages`      messages with large bodies, of which known ones are not read
`cycle_pace`          how long a cycle draws before it replies
`torchserve_entry`    the file that TorchServe imports
`watchdog`            notices that TorchServe sends no more cycles
`single_worker`       keeps a second worker of a model from starting
`garbage`             leaves what a worker has loaded out of garbage collections
`torchserve_logs`     TorchServe's own log lines, one line each
`assembly`            configuration + loaded pipeline → engine → service
`service`             from a request to its reply
`acceleration`        forwards made cheaper
`engine`              requests in flight
`pipelines`           what we know of diffusers' pipelines
`batching`            arguments of several module calls put together: pure tensor code
`loading`             from an unpacked archive to a pipeline
`api`                 what a client may send and gets back; no torch, no diffusers
`zips`                reading untrusted zip files
`config`, `errors`    settings of the operator; every error, with its HTTP status
`config_checks`       what a key of the configuration may be
`messages`            values and names of clients in messages
`library_logs`        quiets the logs of diffusers and transformers
====================  =====================================================================

Imports go downward only: ``diffusers_handler → assembly → service, acceleration → engine →
pipelines, batching → api → errors``, and ``loading → zips, errors, config``; `loading` and `api`
never meet.
"""

__version__ = "0.1.0"
