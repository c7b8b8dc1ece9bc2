{{- define "diffusers.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name }}{{ end -}}
{{- end }}

{{- define "diffusers.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "diffusers.labels" -}}
{{ include "diffusers.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "diffusers.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "diffusers.keysSecret" -}}
{{ .Values.keys.existingSecret | default (printf "%s-keys" (include "diffusers.name" .)) }}
{{- end }}

{{/* What every container may not do. */}}
{{- define "diffusers.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "diffusers.tracing" -}}
{{- with .Values.tracing.endpoint }}
env:
  - {name: OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, value: {{ printf "%s/v1/traces" (trimSuffix "/" .) | quote }}}
{{- end }}
{{- end }}

{{/* Whether one of the four sources of an archive is given, and what else cannot be. */}}
{{- define "diffusers.check" -}}
{{- $a := .Values.archive }}
{{- $sources := 0 }}
{{- range list $a.embedded $a.pull $a.image $a.claim }}{{ if . }}{{ $sources = add $sources 1 }}{{ end }}{{ end }}
{{- if ne (int $sources) 1 }}{{ fail "archive: give exactly one of embedded, pull, image and claim" }}{{ end }}
{{- if not (or .Values.keys.existingSecret .Values.keys.plain) }}{{ fail "keys: the gateway asks for keys; give existingSecret (the file that `make key` writes), or plain to try it out" }}{{ end }}
{{- if and .Values.keys.existingSecret .Values.keys.plain }}{{ fail "keys: give existingSecret or plain, not both" }}{{ end }}
{{- $m := .Values.metrics }}
{{- if and $m.serviceMonitor.enabled (eq $m.for "nobody") }}{{ fail "metrics.serviceMonitor: nobody may read the metrics; let metrics.for be everybody, or a key with metrics.keySecret" }}{{ end }}
{{- if and $m.serviceMonitor.enabled (ne $m.for "everybody") (not $m.keySecret.name) }}{{ fail "metrics.keySecret.name: Prometheus needs the key that metrics.for names" }}{{ end }}
{{- range list "address" "port" "run_dirs" "keys_file" "metrics_for" "drain_s" }}
{{- if hasKey $.Values.gateway.settings . }}{{ fail (printf "gateway.settings.%s: the chart sets it" .) }}{{ end }}
{{- end }}
{{- end }}
