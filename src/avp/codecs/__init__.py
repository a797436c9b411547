"""Codecs: how one tensor becomes bytes. One file each, registered under the entry points `avp.codecs`."""
