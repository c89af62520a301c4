"""Tasks: any command of any member, on the machine of the mesh that suits it best."""
