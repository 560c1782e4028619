-- What a key pair's public key is: ssh, x509.
ALTER TABLE keypairs ADD COLUMN kind TEXT NOT NULL DEFAULT 'ssh';
