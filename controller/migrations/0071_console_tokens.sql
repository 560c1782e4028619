-- URLs of servers' serial consoles: whoever has the token may use the console until it expires.
CREATE TABLE console_tokens (
    token_hash TEXT   PRIMARY KEY, -- SHA-256, hex
    server_id  TEXT   NOT NULL REFERENCES servers (id) ON DELETE CASCADE,
    user_id    TEXT   NOT NULL,
    expires_us BIGINT NOT NULL
);
CREATE INDEX console_tokens_end ON console_tokens (expires_us);
CREATE INDEX console_tokens_server ON console_tokens (server_id);
