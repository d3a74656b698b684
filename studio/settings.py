"""Django settings; every value that may differ between machines is read from the environment.

`.env.example` lists all variables with their defaults. An unknown `STUDIO_*` variable stops the start.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import sys
from importlib.metadata import version as package_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dj_database_url
from csp.constants import NONE, SELF
from django.core.exceptions import ImproperlyConfigured

from studio.env import (
    env_bool,
    env_choice,
    env_file,
    env_int,
    env_list,
    env_path,
    env_secret,
    env_str,
    reject_unknown,
)

BASE_DIR = Path(__file__).resolve().parent.parent
VERSION = re.search(r"^## (\S+)", (BASE_DIR / "CHANGELOG.md").read_text(encoding="utf-8"), re.M).group(1)  # type: ignore[union-attr]

env_file("STUDIO_ENV_FILE", BASE_DIR / ".env")

# --- where things are -----------------------------------------------------------------------------
DATA_DIR = env_path("STUDIO_DATA_DIR", BASE_DIR / "data", make=True)
DATASETS_DIR = DATA_DIR / "datasets"
RUNS_DIR = DATA_DIR / "runs"
BASE_MODELS_DIR = DATA_DIR / "base_models"
MODELS_DIR = DATA_DIR / "models"
LOGS_DIR = DATA_DIR / "logs"
# Folders a person may name in "a folder on the server". The data directory's own models are rows, not paths.
MODEL_ROOTS = [Path(root).expanduser().resolve() for root in env_list("STUDIO_MODEL_ROOTS")]

HOST = env_str("STUDIO_HOST", "127.0.0.1")
PORT = env_int("STUDIO_PORT", 8000, low=0, high=65535)  # 0 = any free one, said at start
HTTPS = env_bool("STUDIO_HTTPS", False)
DEBUG = env_bool("STUDIO_DEBUG", False)

# "" = the embedded Valkey kept by `manage.py studio`; "none" = no broker, workers find work in the database.
REDIS_URL = env_secret("STUDIO_REDIS_URL")
GPU_SLOTS = env_int("STUDIO_GPU_SLOTS", 0, low=0, high=64)  # 0 = one per GPU, one on a machine without
REFERENCE_CACHE_BYTES = env_int("STUDIO_REFERENCE_CACHE_MB", 10_000, low=0, high=100_000_000) * 1024 * 1024
UPLOAD_MAX_BYTES = env_int("STUDIO_UPLOAD_MAX_MB", 2048, low=1, high=1_000_000) * 1024 * 1024
CHAT_IDLE_SECONDS = env_int("STUDIO_CHAT_IDLE_SECONDS", 300, low=5, high=86_400)
STARTER_MODEL = env_bool("STUDIO_STARTER_MODEL", True)  # prepare SmolLM2-135M-Instruct at the first start
HUB_OFFLINE = env_bool("STUDIO_HUB_OFFLINE", False)


def _secret_key() -> str:
    """The key from the environment, else one made on first start and kept beside the data (mode 0600)."""
    given = env_secret("STUDIO_SECRET_KEY")
    if given:
        return given
    path = DATA_DIR / "secret_key"
    if not path.exists():
        part = path.with_name(f"secret_key.{os.getpid()}")
        part.touch(mode=0o600)
        part.write_text(secrets.token_urlsafe(64), encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(part, path)  # whole or not at all, and the first of two wins
        part.unlink()
    return path.read_text(encoding="utf-8").strip()


SECRET_KEY = _secret_key()
ALLOWED_HOSTS = env_list("STUDIO_ALLOWED_HOSTS", "127.0.0.1,localhost,[::1]")
if HOST not in {*ALLOWED_HOSTS, "0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
    ALLOWED_HOSTS.append(HOST)
CSRF_TRUSTED_ORIGINS = env_list("STUDIO_TRUSTED_ORIGINS")
# Whose X-Forwarded-For and -Proto headers are believed (by uvicorn). Behind HTTPS there is a proxy, here by default.
TRUSTED_PROXIES = env_list("STUDIO_TRUSTED_PROXIES", "127.0.0.1,::1" if HTTPS else "")

# --- apps and middleware --------------------------------------------------------------------------
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.humanize",
    "django_htmx",
    "template_partials",
    "csp",
    "axes",
    "channels",
    "studio",
    "studio.accounts",
    "datasets_app",
    "training",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "studio.middleware.PermissionsPolicyMiddleware",
    "csp.middleware.CSPMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.auth.middleware.LoginRequiredMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "axes.middleware.AxesMiddleware",
]

ROOT_URLCONF = "studio.urls"
ASGI_APPLICATION = "studio.asgi.application"

TEMPLATES: list[dict[str, Any]] = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "studio.context.studio",
            ],
        },
    }
]

# --- database -------------------------------------------------------------------------------------
DATABASE_URL = env_secret("DATABASE_URL") or f"sqlite:///{DATA_DIR / 'studio.sqlite3'}"
try:
    DATABASES: dict[str, Any] = {"default": dj_database_url.parse(DATABASE_URL)}
except ValueError:
    raise ImproperlyConfigured(
        "DATABASE_URL is not an address of a database. Use postgres://name:password@host:5432/database, "
        "or unset it for the SQLite file in the data folder."
    ) from None
if DATABASES["default"]["ENGINE"].endswith("sqlite3"):
    # IMMEDIATE: a transaction that reads and then writes waits for its turn instead of failing at the
    # upgrade ("database is locked" in 657 of 1200 transactions without it, in none with it).
    DATABASES["default"]["OPTIONS"] = {
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA foreign_keys=ON;",
    }
else:
    DATABASES["default"]["CONN_HEALTH_CHECKS"] = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# --- broker, queue, live updates ------------------------------------------------------------------
BROKER_SOCKET = env_str("STUDIO_BROKER_SOCKET")  # set by `manage.py studio` for the processes it starts
if REDIS_URL and REDIS_URL != "none":
    CELERY_BROKER_URL, LAYER_URL = REDIS_URL, REDIS_URL
elif BROKER_SOCKET and REDIS_URL != "none":
    CELERY_BROKER_URL, LAYER_URL = f"redis+socket://{BROKER_SOCKET}", f"unix://{BROKER_SOCKET}"
else:
    # No broker: a worker's own sweep rings its own in-memory bell (training/worker/sweep.py).
    CELERY_BROKER_URL, LAYER_URL = "memory://", ""

CELERY_TASK_ACKS_LATE = False  # the lease in the database owns recovery, not the broker
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_DISABLE_PREFETCH = CELERY_BROKER_URL.startswith(("redis", "rediss"))
CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = False
# Not 1: a pool process that ends is often noticed only by a 5 s timer (its pipe closes before it can be reaped),
# and until then the next job waits (measured: gaps of 3.4 to 4.7 s between runs, 0.1 s without).
CELERY_WORKER_MAX_TASKS_PER_CHILD = 100
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None
CELERY_TASK_ROUTES = {
    "training.*": {"queue": "gpu"},
    "datasets.*": {"queue": "default"},
    "models.*": {"queue": "default"},
}
CELERY_TASK_DEFAULT_QUEUE = "default"
CELERY_WORKER_HIJACK_ROOT_LOGGER = False  # LOGGING below speaks for the workers too
CELERY_WORKER_REDIRECT_STDOUTS = False
if CELERY_BROKER_URL != "memory://":
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "visibility_timeout": 3600,
        "global_keyprefix": "studio:",
        "socket_keepalive": not CELERY_BROKER_URL.startswith("redis+socket"),
        "health_check_interval": 25,
        "socket_timeout": 30,
    }

# Two workers under one name on one machine share its slots; machines with equal host names need one each.
WORKER_NAME = env_str("STUDIO_WORKER_NAME") or socket.gethostname()
ENGINE_COMMAND = [sys.executable, "-m", "training.engine", "train"]  # the run directory is appended
CHAT_COMMAND = [sys.executable, "-m", "training.engine", "chat"]
ENGINE_ENV: dict[str, str] = {}  # added to the explicit list that the engine gets
WORKER_TIMES: dict[str, float] = {}  # overrides of training.worker.timing.Times

CHANNEL_LAYERS: dict[str, Any] = (
    {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [LAYER_URL]},
        }
    }
    if LAYER_URL
    else {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
)

# --- people ---------------------------------------------------------------------------------------
AUTH_USER_MODEL = "auth.User"
AUTHENTICATION_BACKENDS = ["axes.backends.AxesStandaloneBackend", "django.contrib.auth.backends.ModelBackend"]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 10}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
LOGIN_URL = "accounts:sign-in"
LOGIN_REDIRECT_URL = "/"
LOGOUT_REDIRECT_URL = "accounts:sign-in"
AXES_FAILURE_LIMIT = 8
AXES_COOLOFF_TIME = 0.25  # hours
AXES_LOCKOUT_PARAMETERS = [["username", "ip_address"]]
AXES_RESET_ON_SUCCESS = True
AXES_ENABLE_ADMIN = False
AXES_VERBOSE = False
AXES_LOCKOUT_CALLABLE = "studio.accounts.views.locked_out"
AXES_DISABLE_ACCESS_LOG = True  # the audit log has it
SILENCED_SYSTEM_CHECKS: list[str] = []
CSRF_FAILURE_VIEW = "studio.errors.csrf_failure"
FIRST_RUN_HOURS = 24  # how long the one-time sign-in link is good for
# Cookies know no ports: two studios on one host would sign each other's people out.
SESSION_COOKIE_NAME = "studio_session" if PORT in {0, 8000} else f"studio_session_{PORT}"
CSRF_COOKIE_NAME = "studio_csrf" if PORT in {0, 8000} else f"studio_csrf_{PORT}"

# --- safety ---------------------------------------------------------------------------------------
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [SELF],
        "script-src": [SELF],
        "style-src-elem": [
            SELF,
            # Two <style> elements of plotly 7.1.0: one empty and filled by insertRule, one with its map's rules.
            "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='",
            "'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='",
        ],
        "style-src-attr": ["'unsafe-inline'"],  # Plotly positions its layers with style attributes
        "img-src": [SELF, "data:", "blob:"],
        "connect-src": [SELF],
        "object-src": [NONE],
        "base-uri": [NONE],
        "form-action": [SELF],
        "frame-ancestors": [NONE],
    }
}
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = HTTPS
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = CSRF_COOKIE_SAMESITE = "Lax"
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
SECURE_CROSS_ORIGIN_OPENER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"
if HTTPS:
    SECURE_SSL_REDIRECT = True
    SECURE_HSTS_SECONDS = 31_536_000
    SECURE_HSTS_INCLUDE_SUBDOMAINS = True
    SECURE_HSTS_PRELOAD = True
DATA_UPLOAD_MAX_MEMORY_SIZE = 2 * 1024 * 1024
DATA_UPLOAD_MAX_NUMBER_FIELDS = 500
FILE_UPLOAD_TEMP_DIR = DATA_DIR / "uploads"
FILE_UPLOAD_TEMP_DIR.mkdir(exist_ok=True)
FILE_UPLOAD_PERMISSIONS = 0o600
FILE_UPLOAD_HANDLERS = ["datasets_app.uploads.StreamingUploadHandler"]  # counts while it streams

# --- static files ---------------------------------------------------------------------------------
PLOTLY_VERSION = package_version("plotly")
_plotly = find_spec("plotly")
assert _plotly is not None and _plotly.submodule_search_locations  # noqa: S101
STATIC_URL = "/static/"
STATIC_ROOT = DATA_DIR / "static"
STATICFILES_DIRS: list[Any] = [
    BASE_DIR / "static",
    # Plotly's own bundle, served from the installed package under its version.
    (f"plotly-{PLOTLY_VERSION}", str(Path(_plotly.submodule_search_locations[0]) / "package_data")),
]
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "studio.staticfiles.HashedStorage"},
}
# Collected by `manage.py studio`; any other process serves the files as they lie.
WHITENOISE_USE_FINDERS = DEBUG or not (STATIC_ROOT / "staticfiles.json").exists()
WHITENOISE_AUTOREFRESH = DEBUG
WHITENOISE_KEEP_ONLY_HASHED_FILES = True
STATIC_ROOT.mkdir(exist_ok=True)

LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True
USE_I18N = False

LOG_LEVEL = env_choice("STUDIO_LOG_LEVEL", "WARNING", ("DEBUG", "INFO", "WARNING", "ERROR"))
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
    "handlers": {
        "console": {"class": "logging.StreamHandler", "formatter": "line"},
        # Who did what: sign-in, sign-out, accounts, and whatever else must be found again.
        "audit": {
            "class": "logging.handlers.WatchedFileHandler",
            "filename": LOGS_DIR / "audit.log",
            "formatter": "line",
            "encoding": "utf-8",
            "delay": True,
        },
    },
    "root": {"handlers": ["console"], "level": LOG_LEVEL},
    "loggers": {
        "studio": {"level": "INFO"},
        "studio.audit": {"level": "INFO", "handlers": ["audit"], "propagate": False},
        "training": {"level": "INFO"},
        "datasets_app": {"level": "INFO"},
        "django.request": {"level": "ERROR"},  # a 404 is no news
        "axes": {"level": "ERROR"},
    },
}
LOGS_DIR.mkdir(exist_ok=True)

env_str("STUDIO_TEST_DATA")  # read by tests alone; whoever sets it for them can start the studio all the same
reject_unknown()
