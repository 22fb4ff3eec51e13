"""The six stages, one file each, of one shape.

A stage module has
- `UPSTREAM`: names of the stages whose artifacts it reads;
- `Artifact`: a frozen dataclass over a finished artifact folder, `Artifact(path)`, that reads it
  back typed and raises `ArtifactError` where it is not what it should be;
- `key_fields(inputs) -> dict`: everything but upstream digests that can change the result, as JSON
  values (the pipeline adds the schema, the package version and the upstream digests);
- `run(inputs) -> dict`: writes files under `inputs.output`, returns metrics for the manifest.
"""
