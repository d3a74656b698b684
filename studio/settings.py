"""Django settings; every value that may differ between machines is read from the environment.

`.env.example` lists all variables with their defaults. An unknown `STUDIO_*` variable stops the start.
"""

from __future__ import annotations

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

from studio.env import env_bool, env_int, env_list, env_path, env_secret, env_str, reject_unknown

BASE_DIR = Path(__file__).resolve().parent.parent
VERSION = re.search(r"^## (\S+)", (BASE_DIR / "CHANGELOG.md").read_text(encoding="utf-8"), re.M).group(1)  # type: ignore[union-attr]

# --- where things are -----------------------------------------------------------------------------
DATA_DIR = env_path("STUDIO_DATA_DIR", BASE_DIR / "data")
DATA_DIR.mkdir(parents=True, exist_ok=True)
DATASETS_DIR = DATA_DIR / "datasets"
RUNS_DIR = DATA_DIR / "runs"
BASE_MODELS_DIR = DATA_DIR / "base_models"
MODELS_DIR = DATA_DIR / "models"
LOGS_DIR = DATA_DIR / "logs"
# Folders a person may name in "a folder on the server". The data directory's own models are rows, not paths.
MODEL_ROOTS = [Path(root).expanduser().resolve() for root in env_list("STUDIO_MODEL_ROOTS")]

HOST = env_str("STUDIO_HOST", "127.0.0.1")
PORT = env_int("STUDIO_PORT", 8000, low=1, high=65535)
HTTPS = env_bool("STUDIO_HTTPS", False)
DEBUG = env_bool("STUDIO_DEBUG", False)

# "" = the embedded Valkey kept by `manage.py studio`; "none" = no broker, workers find work in the database.
REDIS_URL = env_secret("STUDIO_REDIS_URL")
GPU_SLOTS = env_int("STUDIO_GPU_SLOTS", 0, low=0, high=64)  # 0 = one per GPU, one on a machine without
UPLOAD_MAX_BYTES = env_int("STUDIO_UPLOAD_MAX_MB", 2048, low=1, high=1_000_000) * 1024 * 1024
CHAT_IDLE_SECONDS = env_int("STUDIO_CHAT_IDLE_SECONDS", 300, low=5, high=86_400)
HUB_OFFLINE = env_bool("STUDIO_HUB_OFFLINE", False)


def _secret_key() -> str:
    """The key from the environment, else one made on first start and kept beside the data (mode 0600)."""
    given = env_secret("STUDIO_SECRET_KEY")
    if given:
        return given
    path = DATA_DIR / "secret_key"
    try:
        with path.open("x", encoding="utf-8") as file:
            path.chmod(0o600)
            file.write(secrets.token_urlsafe(64))
    except FileExistsError:
        pass
    return path.read_text(encoding="utf-8").strip()


SECRET_KEY = _secret_key()
ALLOWED_HOSTS = env_list("STUDIO_ALLOWED_HOSTS", "127.0.0.1,localhost,[::1]")
if HOST not in {*ALLOWED_HOSTS, "0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
    ALLOWED_HOSTS.append(HOST)
CSRF_TRUSTED_ORIGINS = env_list("STUDIO_TRUSTED_ORIGINS")

# --- apps and middleware --------------------------------------------------------------------------
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
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
DATABASES: dict[str, Any] = {
    "default": dj_database_url.parse(env_secret("DATABASE_URL") or f"sqlite:///{DATA_DIR / 'studio.sqlite3'}")
}
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
CELERY_WORKER_MAX_TASKS_PER_CHILD = 1
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None
CELERY_TASK_ROUTES = {"training.*": {"queue": "gpu"}, "datasets.*": {"queue": "default"}, "models.*": {"queue": "default"}}
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
WORKER_NAME = env_str("STUDIO_WORKER_NAME", socket.gethostname())
ENGINE_COMMAND = [sys.executable, "-m", "training.engine", "train"]  # the run directory is appended
ENGINE_ENV: dict[str, str] = {}  # added to the explicit list that the engine gets
WORKER_TIMES: dict[str, float] = {}  # overrides of training.worker.timing.Times

CHANNEL_LAYERS: dict[str, Any] = (
    {"default": {"BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer", "CONFIG": {"hosts": [LAYER_URL]}}}
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

# --- safety ---------------------------------------------------------------------------------------
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [SELF],
        "script-src": [SELF],
        # The first hash is that of the empty <style> Plotly creates and fills by insertRule.
        "style-src-elem": [SELF, "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"],
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
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
DATA_UPLOAD_MAX_MEMORY_SIZE = 2 * 1024 * 1024
DATA_UPLOAD_MAX_NUMBER_FIELDS = 500
FILE_UPLOAD_TEMP_DIR = DATA_DIR / "uploads"
FILE_UPLOAD_TEMP_DIR.mkdir(exist_ok=True)
FILE_UPLOAD_PERMISSIONS = 0o600

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
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
}
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = DEBUG

LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True
USE_I18N = False

LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": env_str("STUDIO_LOG_LEVEL", "WARNING")},
    "loggers": {"studio": {"level": "INFO"}, "training": {"level": "INFO"}, "datasets_app": {"level": "INFO"}},
}

reject_unknown()
