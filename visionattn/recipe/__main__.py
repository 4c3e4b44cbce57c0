"""`python -m visionattn.recipe` prints the JSON schema of a recipe, for editors."""

import json

from visionattn.recipe import json_schema

print(json.dumps(json_schema(), indent=1))
