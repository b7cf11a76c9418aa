"""Names of the files that a migration and a fleet leave in their output directories."""

REPORT = "report.html"
RECORD = "migration.json"
FLEET_RECORD = "fleet.json"
FIGURE_DATA = "figures.safetensors"
