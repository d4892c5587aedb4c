#![no_main]

taod_fuzz::target!(Litellm);
