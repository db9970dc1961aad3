"""HTTP: one APIRouter a resource. Routes parse and answer; the work is done by the modules beside main.py."""
