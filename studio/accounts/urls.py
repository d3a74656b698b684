"""Addresses of this part."""

from __future__ import annotations

from django.urls import URLPattern, URLResolver, path

from studio.accounts import views

app_name = "accounts"
urlpatterns: list[URLPattern | URLResolver] = [
    path("sign-in/", views.sign_in, name="sign-in"),
    path("sign-out/", views.sign_out, name="sign-out"),
    path("first-run/<str:token>/", views.first_run, name="first-run"),
    path("account/", views.password, name="password"),
    path("people/", views.people, name="people"),
    path("people/<int:user_id>/active/", views.set_active, name="set-active"),
]
